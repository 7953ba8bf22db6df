"""What can go wrong, in one tree. Every message is one line that says what is wrong and what to do.

MeshLlmError
├── TransportError          a peer cannot be reached, or went away
├── ProtocolError           a peer breaks the protocol, or speaks another version of it
├── GgufError               a model file is missing, broken or not a model
├── ModelError              a model cannot be found or fetched
│   └── NotOnDiskError      no file on this machine matches the name
├── IdentityError           this node's key cannot be used
├── TokenError              an invite token is not valid
├── MeshError               the mesh cannot be joined, or refuses this node
├── EngineError             llama-server is missing, or cannot run this model here
├── UnknownModelError       a request names a model that is not served; the message lists those that are
├── WrongModelError         a request asks a model for what it cannot do
└── NotJsonError            the body of a request is not JSON
"""


class MeshLlmError(Exception):
    """The command prints the message and exits with status 2."""


class TransportError(MeshLlmError):
    pass


class ProtocolError(MeshLlmError):
    pass


class GgufError(MeshLlmError):
    pass


class ModelError(MeshLlmError):
    pass


class NotOnDiskError(ModelError):
    pass


class IdentityError(MeshLlmError):
    pass


class TokenError(MeshLlmError):
    pass


class MeshError(MeshLlmError):
    pass


class EngineError(MeshLlmError):
    pass


class UnknownModelError(MeshLlmError):
    pass


class WrongModelError(MeshLlmError):
    pass


class NotJsonError(MeshLlmError):
    pass
