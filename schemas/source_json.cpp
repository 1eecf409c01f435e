#include "schemas/source_json.h"

#include <tuple>

namespace kvplan {

nlohmann::json source_to_json(const ProfileSource& source) {
  return {{"name", source.name},
          {"sha256", source.sha256},
          {"tokens", source.tokens},
          {"part", {source.part_begin, source.part_end}},
          {"weight", source.weight}};
}

ProfileSource source_from_json(JsonObject object) {
  ProfileSource source;
  source.name = object.text("name");
  source.sha256 = object.sha256("sha256");
  source.tokens = object.integer("tokens");
  std::tie(source.part_begin, source.part_end) = object.part("part");
  source.weight = object.number("weight", 0);
  object.finish();
  return source;
}

}  // namespace kvplan
