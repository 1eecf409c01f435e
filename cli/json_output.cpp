#include "cli/json_output.h"

#include <nlohmann/json.hpp>

namespace kvplan::cli {

namespace {

nlohmann::json rope_json(const RopeSpec& rope) {
  return {{"style", rope.style},
          {"base", rope.base},
          {"scaling", rope.scaling ? nlohmann::json(rope.scaling->type) : nlohmann::json()}};
}

}  // namespace

std::string model_json(const models::ModelReader& model) {
  const auto& c = model.config();
  const auto& s = model.spec();
  const nlohmann::json j = {
      {"format", "kvplan.model"},
      {"version", 1},
      {"architecture", c.architecture},
      {"container", c.container},
      {"num_layers", c.num_layers},
      {"hidden_size", c.hidden_size},
      {"intermediate_size", c.intermediate_size},
      {"vocab_size", c.vocab_size},
      {"query_heads", c.query_heads},
      {"kv_heads", c.kv_heads},
      {"head_dim", c.head_dim},
      {"rotary_dim", c.rotary_dim},
      {"rope", rope_json(c.rope)},
      {"local_rope", c.local_rope ? rope_json(*c.local_rope) : nlohmann::json()},
      {"windows", c.windows},
      {"attention_soft_cap", c.attention_soft_cap},
      {"logit_soft_cap", c.logit_soft_cap},
      {"tied_embeddings", c.tied_embeddings},
      {"max_context", c.max_context},
      {"fp16_kv_bytes_per_token", 2 * elements_per_token(s)},
      {"kv_weights_sha256", s.kv_weights_sha256}};
  return j.dump(2) + "\n";
}

}  // namespace kvplan::cli
