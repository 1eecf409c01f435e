# kvplan_library(NAME SOURCES ... HEADERS ...): folder = target = namespace, headers based at the repository root.

add_library(kvplan_warnings INTERFACE)
target_compile_options(kvplan_warnings INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wconversion;-Wno-sign-conversion>
  # g++ 12 sees overlapping copies inside std::string that are not there (GCC PR 105651).
  $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<CXX_COMPILER_ID:GNU>>:-Wno-restrict>
  $<$<AND:$<BOOL:${KVPLAN_WERROR}>,$<COMPILE_LANGUAGE:CXX>>:-Werror>)

# Results must not depend on the compiler's taste for fused operations (docs/architecture.md, determinism).
add_library(kvplan_numerics INTERFACE)
target_compile_options(kvplan_numerics INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-ffp-contract=off>)
target_compile_definitions(kvplan_numerics INTERFACE EIGEN_DONT_VECTORIZE EIGEN_DONT_PARALLELIZE)

find_program(KVPLAN_MOLD mold)
if(KVPLAN_MOLD)
  target_link_options(kvplan_warnings INTERFACE -fuse-ld=mold)
endif()

function(kvplan_library name)
  cmake_parse_arguments(ARG "" "" "SOURCES;HEADERS" ${ARGN})
  add_library(kvplan_${name} STATIC ${ARG_SOURCES})
  add_library(kvplan::${name} ALIAS kvplan_${name})
  target_sources(kvplan_${name} PUBLIC FILE_SET HEADERS BASE_DIRS ${PROJECT_SOURCE_DIR} FILES ${ARG_HEADERS})
  target_link_libraries(kvplan_${name} PRIVATE $<BUILD_INTERFACE:kvplan_warnings> $<BUILD_INTERFACE:kvplan_numerics>)
  target_compile_features(kvplan_${name} PUBLIC cxx_std_20)
  set_target_properties(kvplan_${name} PROPERTIES EXPORT_NAME ${name} POSITION_INDEPENDENT_CODE ON)
endfunction()
