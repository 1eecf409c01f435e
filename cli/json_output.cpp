#include "cli/json_output.h"

#include <nlohmann/json.hpp>

namespace kvplan::cli {

std::string model_json(const calib::ModelReader& model) {
  const auto& c = model.config();
  const auto& s = model.spec();
  const nlohmann::json j = {{"format", "kvplan.model"},
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
                            {"rope", {{"style", c.rope.style}, {"base", c.rope.base}}},
                            {"tied_embeddings", c.tied_embeddings},
                            {"max_context", c.max_context},
                            {"fp16_kv_bytes_per_token", 2 * elements_per_token(s)},
                            {"kv_weights_sha256", s.kv_weights_sha256}};
  return j.dump(2) + "\n";
}

}  // namespace kvplan::cli
