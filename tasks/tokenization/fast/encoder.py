"""Conversations as ids without rendering them: the constants of a skeleton encoded once, the contents word by word.

A conversation whose ids are not certain (a content that holds an added token, an unknown template condition) is left to
`masking.build_many`, which defines the right result.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from schemas.config import TokenizationConfig
from tasks.tokenization.errors import MaskError
from tasks.tokenization.fast.programs import Contents, Program, compile_skeleton
from tasks.tokenization.fast.skeletons import MOST_SHAPES, Skeleton, find_skeleton
from tasks.tokenization.fast.words import NotByWords, WordEncoder, open_words
from tasks.tokenization.labels import ID_TYPE, Example
from tasks.tokenization.masking import Conversation, choose_turns
from tasks.tokenization.rendering import Chat, open_chat

_PLAIN_KEYS = {"role", "content"}


@dataclass(frozen=True, eq=False)
class _Assembler:
    """A tokenizer and template whose conversations can be assembled."""

    chat: Chat
    words: WordEncoder
    config: TokenizationConfig
    starts: tuple[str, ...]
    """First characters of added tokens; a content without them holds none."""
    programs: WeakKeyDictionary[Skeleton, tuple[Program, ...] | None] = field(default_factory=WeakKeyDictionary)
    turns: dict[tuple[str, ...], tuple[int, ...]] = field(default_factory=dict)
    """The messages to train on, by the roles of all; nothing else decides it where messages have no further keys."""

    def __call__(self, conversation: Conversation) -> list[Example] | None:
        """Return a conversation's examples, or None where it has to be rendered."""
        if conversation.tools is not None:
            return None
        roles, contents = [], []
        for message in conversation.messages:
            if not isinstance(message, dict) or message.keys() != _PLAIN_KEYS:
                return None
            role, content = message["role"], message["content"]
            if type(role) is not str or role == "developer" or type(content) is not str or self._holds_added(content):
                return None
            roles.append(role)
            contents.append(content)
        try:
            shape = tuple(roles)
            indices = self.turns.get(shape)
            if indices is None:
                indices = tuple(choose_turns(conversation.messages, self.config))
                if len(self.turns) < MOST_SHAPES:
                    self.turns[shape] = indices
            skeleton = find_skeleton(self.chat, shape, indices, contents)
            if skeleton is None:
                return None
            if skeleton not in self.programs:
                self.programs[skeleton] = compile_skeleton(skeleton, self.words.encode)
            programs = self.programs[skeleton]
            return [self._run(program, contents) for program in programs] if programs else None
        except (MaskError, NotByWords):
            return None

    def _holds_added(self, content: str) -> bool:
        for start in self.starts:  # a loop: any() takes three times as long, for every content
            if start in content:
                return self.chat.pattern.search(content) is not None
        return False

    def _run(self, program: Program, contents: Contents) -> Example:
        """Encode one example.

        Raises:
            NotByWords: its ids are not known for certain, or are too many.
        """
        encode = self.words.encode
        pieces: list[bytes] = []
        spans: list[tuple[int, int]] = []
        size = start = 0  # tokens so far, and where the last answer begins
        for text, ids, front, front_ids, ends in program.segments:
            if ends:
                spans.append((start, size))
            if front is not None:
                head = front_ids or encode(front(contents))
                ids = encode(text(contents))
                if not ids.startswith(head):
                    raise NotByWords  # the tokenizer merges across the border
                start = size + len(head) // ID_TYPE.itemsize
            elif not ids:
                ids = encode(text(contents))
            pieces.append(ids)
            size += len(ids) // ID_TYPE.itemsize
        spans.append((0, size) if self.config.train_on_prompt else (start, size))
        if size > self.config.max_length:
            raise NotByWords
        if self.config.train_on_prompt:
            del spans[:-1]
        return Example(b"".join(pieces), tuple(spans), program.turns, program.target(contents))


def open_fast(
    tokenizer: PreTrainedTokenizerBase, config: TokenizationConfig
) -> Callable[[Conversation], list[Example] | None] | None:
    """Return what makes a conversation's examples without rendering it; None where the tokenizer has no such way.

    What is returned gives the examples of `masking.build_many`, or None for a conversation that has to be rendered.
    """
    words = open_words(tokenizer)
    if words is None:
        return None
    try:
        chat = open_chat(tokenizer)
    except MaskError:
        return None
    if chat.forms.content_as_parts:
        return None
    starts = {token[0] for token in chat.added}
    return _Assembler(chat, words, config, tuple(sorted(starts)))
