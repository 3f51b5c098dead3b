"""Conversations as ids without rendering them: the constants of a skeleton encoded once, the contents word by word.

Every content is looked through for added tokens first, and what is not known for certain is left to
`masking.build_many`, which is also the meaning of what is done here.
"""

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from schemas.config import TokenizationConfig
from tasks.tokenization.errors import MaskError
from tasks.tokenization.fast.programs import Contents, Program, compile_skeleton
from tasks.tokenization.fast.skeletons import MOST_SHAPES, Skeleton, find_skeleton
from tasks.tokenization.fast.words import ID_TYPE, NotByWords, WordEncoder, open_words
from tasks.tokenization.masking import Conversation, choose_turns
from tasks.tokenization.rendering import Chat, open_chat
from tasks.tokenization.tables import Line

_PLAIN_KEYS = {"role", "content"}


@dataclass(frozen=True, eq=False)
class Assembler:
    """A tokenizer and template whose conversations can be assembled."""

    chat: Chat
    words: WordEncoder
    config: TokenizationConfig
    starts: tuple[str, ...]
    """First characters of added tokens; a content without them holds none."""
    programs: WeakKeyDictionary[Skeleton, tuple[Program, ...] | None] = field(default_factory=WeakKeyDictionary)
    turns: dict[tuple[str, ...], tuple[int, ...]] = field(default_factory=dict)
    """The messages to train on, by the roles of all; nothing else decides it where messages have no further keys."""

    def assemble(self, conversation: Conversation) -> list[Line] | None:
        """Return a conversation's examples, or None where it has to be rendered."""
        if conversation.tools is not None:
            return None
        roles, contents = [], []
        for message in conversation.messages:
            if not isinstance(message, dict) or message.keys() != _PLAIN_KEYS:
                return None
            role, content = message["role"], message["content"]
            if type(role) is not str or type(content) is not str or self._holds_added(content):
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

    def _run(self, program: Program, contents: Contents) -> Line:
        """Encode one example.

        Raises:
            NotByWords: its ids are not known for certain, or are too many.
        """
        encode = self.words.encode
        pieces: list[bytes] = []
        runs: list[int] = []
        size = 0  # bytes since the last border
        for text, ids, front, front_ids, ends in program.segments:
            if ends:
                runs.append(size)
                size = 0
            if front is not None:
                head = front_ids or encode(front(contents))
                ids = encode(text(contents))
                if not ids.startswith(head):
                    raise NotByWords  # the tokenizer merges across the border
                runs.append(size + len(head))
                size = -len(head)
            elif not ids:
                ids = encode(text(contents))
            pieces.append(ids)
            size += len(ids)
        runs.append(size)
        if sum(runs) > self.config.max_length * ID_TYPE.itemsize:
            raise NotByWords
        runs = [run // ID_TYPE.itemsize for run in runs]
        if self.config.train_on_prompt:
            runs = [0, sum(runs)]
        question = "" if program.question is None else contents[program.question]
        return Line(b"".join(pieces), runs, question, program.refer(contents))


def open_assembler(tokenizer: Any, config: TokenizationConfig) -> Assembler | None:
    """Return what assembles this tokenizer's conversations, or None where its words are not encoded apart."""
    words = open_words(tokenizer)
    if words is None:
        return None
    try:
        chat = open_chat(tokenizer)
    except MaskError:
        return None
    starts = {token[0] for token in chat.added}
    return Assembler(chat, words, config, tuple(sorted(starts)))
