# llama.cpp, unmodified: fetched by name and hash, built once per version, flags, compiler and processor, and cached.
# Options of llama.cpp that the user gives (GGML_CUDA=ON, ...) are passed on.

get_cmake_property(cache_variables CACHE_VARIABLES)
set(llama_defines)
foreach(name ${cache_variables})
    if(name MATCHES "^(GGML|LLAMA)_" OR name MATCHES "^CMAKE_(CUDA|HIP|OSX)_(ARCHITECTURES|COMPILER|DEPLOYMENT_TARGET)$")
        if(NOT "${${name}}" STREQUAL "")
            list(APPEND llama_defines "--define" "${name}=${${name}}")
        endif()
    endif()
endforeach()

execute_process(
    COMMAND ${Python_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/llama_cpp.py
            --source ${CMAKE_SOURCE_DIR}/third_party/llama.cpp
            --cmake ${CMAKE_COMMAND} --cc ${CMAKE_C_COMPILER} --cxx ${CMAKE_CXX_COMPILER} ${llama_defines}
    OUTPUT_VARIABLE llama_output OUTPUT_STRIP_TRAILING_WHITESPACE
    RESULT_VARIABLE llama_result)
if(NOT llama_result EQUAL 0)
    message(FATAL_ERROR "llama.cpp could not be built; see the lines above")
endif()
string(REGEX REPLACE ".*\n" "" engine_folder "${llama_output}")
set(MESH_ENGINE ${engine_folder} CACHE INTERNAL "programs and libraries of llama.cpp")
set(MESH_LLAMA_SOURCE ${CMAKE_SOURCE_DIR}/third_party/llama.cpp CACHE INTERNAL "its source, for headers")

foreach(library ggml-base ggml-cpu ggml)
    add_library(${library} SHARED IMPORTED GLOBAL)
    set_target_properties(${library} PROPERTIES
        IMPORTED_LOCATION ${MESH_ENGINE}/${CMAKE_SHARED_LIBRARY_PREFIX}${library}${CMAKE_SHARED_LIBRARY_SUFFIX}
        INTERFACE_INCLUDE_DIRECTORIES "${MESH_LLAMA_SOURCE}/ggml/include;${MESH_LLAMA_SOURCE}/ggml/src")
endforeach()
add_library(nlohmann_json INTERFACE)
target_include_directories(nlohmann_json SYSTEM INTERFACE ${MESH_LLAMA_SOURCE}/vendor)

mesh_licence(llama.cpp ${MESH_LLAMA_SOURCE}/LICENSE)
file(GLOB llama_licences ${MESH_LLAMA_SOURCE}/licenses/LICENSE-*)
foreach(file ${llama_licences})
    get_filename_component(name ${file} NAME)
    string(REPLACE "LICENSE-" "llama.cpp-" name ${name})
    mesh_licence(${name} ${file})
endforeach()
