"""What can go wrong, in one tree. Every message is one line that says what is wrong and what to do.

MeshLlmError
├── TransportError    a peer cannot be reached, or went away
├── ProtocolError     a peer speaks another language, or breaks ours
├── GgufError         a model file is missing, broken or not a model
├── ModelError        a model's name fits nothing
├── IdentityError     this node's key cannot be used
├── TokenError        an invite token is not valid
├── MeshError         the mesh cannot be joined, or does not admit us
└── EngineError       llama-server is missing, or cannot run this model here
"""


class MeshLlmError(Exception):
    """The command ends with `exit_code` after printing the message."""

    exit_code = 2


class TransportError(MeshLlmError):
    pass


class ProtocolError(MeshLlmError):
    pass


class GgufError(MeshLlmError):
    pass


class ModelError(MeshLlmError):
    pass


class IdentityError(MeshLlmError):
    pass


class TokenError(MeshLlmError):
    pass


class MeshError(MeshLlmError):
    pass


class EngineError(MeshLlmError):
    pass
