# The rooms of csrc/, each a static library; see docs/architecture.md for who knows whom.

function(mesh_room name)
    file(GLOB sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/csrc/${name}/*.cpp)
    add_library(mesh_${name} STATIC ${sources})
    target_include_directories(mesh_${name} PUBLIC ${CMAKE_SOURCE_DIR}/csrc)
    target_compile_options(mesh_${name} PRIVATE -Wall -Wextra -Werror)
    target_link_libraries(mesh_${name} PUBLIC ${ARGN})
endfunction()

mesh_room(wire)
mesh_room(channel mesh_wire)
mesh_room(gguf ggml-base)
mesh_room(compute ggml ggml-base)
mesh_room(server mesh_wire mesh_channel mesh_gguf mesh_compute ggml ggml-base ggml-cpu Threads::Threads)
if(MESH_QUIC)
    mesh_room(quic mesh_channel picoquic)
endif()

file(GLOB backend_sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/csrc/backend/*.cpp)
add_library(ggml-mesh MODULE ${backend_sources})
set_target_properties(ggml-mesh PROPERTIES PREFIX "lib" SUFFIX ${CMAKE_SHARED_LIBRARY_SUFFIX})
target_compile_options(ggml-mesh PRIVATE -Wall -Wextra -Werror)
target_link_libraries(ggml-mesh PRIVATE mesh_wire mesh_channel mesh_gguf mesh_compute ggml ggml-base nlohmann_json)

add_executable(mesh-llm-leash ${CMAKE_SOURCE_DIR}/csrc/leash/leash.cpp)
target_compile_options(mesh-llm-leash PRIVATE -Wall -Wextra -Werror)

# What a model takes, asked of llama.cpp itself; its headers outside llama.h are not for -Werror.
add_executable(mesh-llm-measure ${CMAKE_SOURCE_DIR}/csrc/measure/measure.cpp ${CMAKE_SOURCE_DIR}/csrc/measure/figures.cpp)
target_compile_options(mesh-llm-measure PRIVATE -Wall -Wextra -Werror)
target_include_directories(mesh-llm-measure PRIVATE ${CMAKE_SOURCE_DIR}/csrc)
foreach(folder . include common vendor tools/mtmd)
    target_include_directories(mesh-llm-measure SYSTEM PRIVATE ${MESH_LLAMA_SOURCE}/${folder})
endforeach()
foreach(library llama llama-common mtmd)
    target_link_libraries(mesh-llm-measure PRIVATE
        ${MESH_ENGINE}/${CMAKE_SHARED_LIBRARY_PREFIX}${library}${CMAKE_SHARED_LIBRARY_SUFFIX})
endforeach()
target_link_libraries(mesh-llm-measure PRIVATE ggml ggml-base ggml-cpu)
