# cmake -DOUTPUT=assets.cpp -DNAMES="kHtml;kCss" -DFILES="a.html;b.css" -P EmbedFiles.cmake
# Writes each file as a byte array with a string_view of that name.
set(text "// Made by cmake/EmbedFiles.cmake.\n#include \"cli/report/assets.h\"\n\nnamespace kvplan::cli::assets {\nnamespace {\n\n")
set(views "")
foreach(name file IN ZIP_LISTS NAMES FILES)
  file(READ "${file}" hex HEX)
  string(REGEX REPLACE "([0-9a-f][0-9a-f])" "0x\\1," bytes "${hex}")
  string(APPEND text "const unsigned char ${name}Bytes[] = {${bytes}0};\n")
  string(APPEND views "const std::string_view ${name}(reinterpret_cast<const char*>(${name}Bytes), sizeof ${name}Bytes - 1);\n")
endforeach()
file(WRITE "${OUTPUT}" "${text}\n}  // namespace\n\n${views}\n}  // namespace kvplan::cli::assets\n")
