"""Conversations to token ids, with the template of a codec's own base."""

from server.text.codec import Codec
from server.text.conversation import Conversation


def encode_chat(codec: Codec, chat: Conversation) -> list[int]:
    """Return the token ids of a conversation. Raises InvalidRequest."""
    return codec.render_chat(chat, codec.require_template()).tokens
