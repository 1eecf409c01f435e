# cmake --install: libraries and headers of the folders that need neither CUDA nor LibTorch, the CUDA runtime with its C header, the
# program, JSON Schemas, manual pages and completions. docs/compatibility.md says what of this stays stable.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

install(TARGETS kvplan_schemas kvplan_quant kvplan_planner EXPORT kvplan-targets COMPONENT development
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT development
  FILE_SET HEADERS DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/kvplan COMPONENT development)
install(EXPORT kvplan-targets NAMESPACE kvplan:: DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/kvplan COMPONENT development)
# A file of its own: only who asks for the exporters needs yaml-cpp.
install(TARGETS kvplan_exporters EXPORT kvplan-exporters-targets COMPONENT development
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT development
  FILE_SET HEADERS DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/kvplan COMPONENT development)
install(EXPORT kvplan-exporters-targets NAMESPACE kvplan:: DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/kvplan COMPONENT development)
configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/kvplan-config.cmake.in ${PROJECT_BINARY_DIR}/kvplan-config.cmake
  INSTALL_DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/kvplan)
# Until 1.0 a minor version may change the C++ interface.
write_basic_package_version_file(${PROJECT_BINARY_DIR}/kvplan-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/kvplan-config.cmake ${PROJECT_BINARY_DIR}/kvplan-config-version.cmake
  DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/kvplan COMPONENT development)
install(DIRECTORY ${PROJECT_SOURCE_DIR}/schemas/json/ DESTINATION ${CMAKE_INSTALL_DATADIR}/kvplan/schemas COMPONENT development
  FILES_MATCHING PATTERN "*.json")

if(KVPLAN_CUDA)
  set_target_properties(kvplan_runtime PROPERTIES VERSION ${PROJECT_VERSION} SOVERSION ${PROJECT_VERSION_MAJOR})
  install(TARGETS kvplan_runtime LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT runtime)
  install(FILES ${PROJECT_SOURCE_DIR}/kernels/runtime.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/kvplan/kernels COMPONENT runtime)
  configure_file(${CMAKE_CURRENT_LIST_DIR}/kvplan_runtime.pc.in ${PROJECT_BINARY_DIR}/kvplan_runtime.pc @ONLY)
  install(FILES ${PROJECT_BINARY_DIR}/kvplan_runtime.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig COMPONENT runtime)
endif()

if(KVPLAN_TORCH)
  # The libraries of LibTorch where the build found them; in a wheel, those of the torch package beside it (scripts/wheel).
  set_target_properties(kvplan PROPERTIES INSTALL_RPATH_USE_LINK_PATH ON INSTALL_RPATH "$ORIGIN/../lib;$ORIGIN/../../torch/lib")
  install(TARGETS kvplan RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR} COMPONENT program)
  install(CODE "
    set(shells bash zsh fish)
    set(files bash-completion/completions/kvplan zsh/site-functions/_kvplan fish/vendor_completions.d/kvplan.fish)
    set(prefix \"\$ENV{DESTDIR}\${CMAKE_INSTALL_PREFIX}\")
    set(program \"$<TARGET_FILE:kvplan>\")
    execute_process(COMMAND \${program} man \${prefix}/${CMAKE_INSTALL_MANDIR}/man1 --quiet OUTPUT_QUIET COMMAND_ERROR_IS_FATAL ANY)
    foreach(shell file IN ZIP_LISTS shells files)
      execute_process(COMMAND \${program} completion \${shell} OUTPUT_VARIABLE text COMMAND_ERROR_IS_FATAL ANY)
      file(WRITE \${prefix}/${CMAKE_INSTALL_DATADIR}/\${file} \"\${text}\")
    endforeach()" COMPONENT program)
endif()
