# picoquic and picotls, unmodified, as one static library `picoquic` with OpenSSL's cryptography.
#
# Only what QUIC needs of them: no HTTP/3, no logs, no second TLS library. Sets MESH_QUIC when it can be built.

find_package(OpenSSL 3.0 COMPONENTS Crypto)
if(NOT OpenSSL_FOUND)
    message(WARNING "OpenSSL 3 and its headers (libssl-dev) were not found: the native QUIC stack is left out, aioquic is used instead")
    return()
endif()
set(MESH_QUIC ON)

set(quic_sources ${CMAKE_SOURCE_DIR}/third_party/quic)
execute_process(
    COMMAND ${Python_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/picoquic.py ${quic_sources}
    OUTPUT_VARIABLE picoquic_sources OUTPUT_STRIP_TRAILING_WHITESPACE
    RESULT_VARIABLE picoquic_result)
if(NOT picoquic_result EQUAL 0)
    message(FATAL_ERROR "picoquic's source could not be fetched; see the lines above")
endif()

string(REPLACE "\n" ";" picoquic_sources "${picoquic_sources}")
set(picotls ${quic_sources}/picotls)

add_library(picoquic STATIC ${picoquic_sources})
target_include_directories(picoquic SYSTEM PUBLIC ${quic_sources}/picoquic/picoquic ${picotls}/include)
target_compile_options(picoquic PRIVATE -w)
target_compile_definitions(picoquic PUBLIC DISABLE_DEBUG_PRINTF PICOQUIC_WITHOUT_SSLKEYLOG)
target_link_libraries(picoquic PUBLIC OpenSSL::Crypto Threads::Threads)

# AES-GCM for short packets, written for the instructions of newer x86; chosen when the processor has them.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|amd64|AMD64")
    target_sources(picoquic PRIVATE ${picotls}/lib/fusion.c)
    set_source_files_properties(${picotls}/lib/fusion.c PROPERTIES
        COMPILE_OPTIONS "-mavx2;-maes;-mpclmul;-mvaes;-mvpclmulqdq")
else()
    target_compile_definitions(picoquic PRIVATE PTLS_WITHOUT_FUSION)
endif()

# Their licences go with the program. picotls has none as a file; each of its sources begins with it.
file(READ ${picotls}/lib/picotls.c picotls_text)
string(FIND "${picotls_text}" "*/" picotls_licence_end)
string(SUBSTRING "${picotls_text}" 0 ${picotls_licence_end} picotls_licence)
file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/picotls-LICENSE "${picotls_licence}\n")
mesh_licence(picoquic ${quic_sources}/picoquic/LICENSE)
mesh_licence(picotls ${CMAKE_CURRENT_BINARY_DIR}/picotls-LICENSE)
# A wheel carries OpenSSL too, once auditwheel or delocate has made it independent of the system's.
find_file(openssl_licence NAMES libssl-dev/copyright openssl/LICENSE openssl/LICENSE.txt LICENSE.txt LICENSE NO_DEFAULT_PATH
          PATHS ${OPENSSL_INCLUDE_DIR}/../share/doc ${OPENSSL_INCLUDE_DIR}/../share/licenses ${OPENSSL_INCLUDE_DIR}/..)
if(openssl_licence)
    mesh_licence(openssl ${openssl_licence})
endif()
if(EXISTS /usr/share/common-licenses/Apache-2.0) # to which Debian's text refers
    mesh_licence(Apache-2.0 /usr/share/common-licenses/Apache-2.0)
endif()
