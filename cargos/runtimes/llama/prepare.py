"""From a consumer's words to what the engine works on. Everything invalid is refused here, before native code.

Runs beside the engine, in a thread of its own: tokenising a long conversation takes as long as several
decode steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import msgspec

from cargos.runtimes.base import JobRefused
from cargos.runtimes.llama.grammar import gbnf_source
from cargos.runtimes.llama.native import Grammar, GrammarTooCostly, Model, NativeError
from cargos.runtimes.llama.patience import Patience
from cargos.runtimes.llama.template import CHATML, ChatTemplate
from protocol.work import ChatMessage, ChatPrompt, Generation, TextPrompt

#: A text of more bytes than this per token of context can not fit, whatever it says. It spares tokenising
#: megabytes only to count them; whole lines of spaces or dashes are single tokens in some vocabularies.
_MIN_BOUND_BYTES_PER_TOKEN: Final = 16


_INSTRUCTING: Final = frozenset({"system", "developer"})


@dataclass(slots=True)
class Prepared:
    """A job in the engine's terms. `room`: tokens that may be generated in all."""

    work: Generation
    prompt: list[int]
    resume: list[int]
    room: int
    grammar: Grammar | None


class Preparer:
    """`system_prompt` is put before conversations that have none of their own.

    Raises TemplateFailed if the model's (or the Cargo's) template does not compile.
    """

    def __init__(
        self,
        model: Model,
        context_length: int,
        chat_template: str | None,
        system_prompt: str | None = None,
    ) -> None:
        self.patience: Final = Patience()
        self._system = ChatMessage("system", system_prompt) if system_prompt else None
        self._model = model
        self._context_length = context_length
        self._max_bytes = context_length * max(model.max_piece_bytes, _MIN_BOUND_BYTES_PER_TOKEN)
        self._bos_text = model.text_of(model.bos).decode("utf-8", "replace") if model.bos >= 0 else ""
        eos_text = model.text_of(model.eos).decode("utf-8", "replace") if model.eos >= 0 else ""
        self._template = ChatTemplate(
            chat_template or model.chat_template() or CHATML,
            bos=self._bos_text,
            eos=eos_text,
            control_texts=model.control_texts(),
        )

    def prepare(self, key: int, work: Generation, resume: tuple[int, ...]) -> Prepared:
        """Raises JobRefused. `patience` says when the constraint of job `key` takes too long."""
        self._check_ids(resume, "the tokens to resume from")
        self._check_ids(tuple(token for token, _ in work.sampling.logit_bias), "logit_bias")
        prompt = self._prompt(work)
        if not prompt:
            raise JobRefused("invalid", "the prompt is empty")
        if len(prompt) >= self._context_length:
            raise JobRefused(
                "too-long",
                f"the prompt has {len(prompt)} tokens; with one more for the answer it exceeds"
                f" this model's context length of {self._context_length}",
            )
        room = self._context_length - len(prompt)
        if work.max_tokens is not None:
            room = min(room, work.max_tokens)
        if len(resume) > room:
            raise JobRefused(
                "invalid", f"{len(resume)} tokens to resume from, but at most {room} may be generated"
            )
        with self.patience.on(key):
            grammar = self._grammar(work, resume)
        return Prepared(work, prompt, list(resume), room, grammar)

    def _prompt(self, work: Generation) -> list[int]:
        prompt = work.prompt
        if isinstance(prompt, ChatPrompt):
            if self._system is not None and not any(m.role in _INSTRUCTING for m in prompt.messages):
                prompt = msgspec.structs.replace(prompt, messages=(self._system, *prompt.messages))
            tokens: list[int] = []
            for part in self._template.render(prompt, self._max_bytes):
                tokens += self._tokenize(part, parse_special=True)
            if self._model.add_bos and tokens[:1] != [self._model.bos]:
                tokens.insert(0, self._model.bos)
            return tokens
        if isinstance(prompt, TextPrompt):
            tokens = self._tokenize(prompt.text, parse_special=False)
            return [self._model.bos, *tokens] if self._model.add_bos else tokens
        self._check_ids(prompt.tokens, "the prompt")
        return list(prompt.tokens)

    def _tokenize(self, text: str, *, parse_special: bool) -> list[int]:
        if len(text) > self._max_bytes:
            raise JobRefused(
                "too-long",
                f"{len(text)} characters exceed this model's context length of {self._context_length} tokens",
            )
        return self._model.tokenize(text, parse_special=parse_special) if text else []

    def _check_ids(self, ids: tuple[int, ...], where: str) -> None:
        if ids and not 0 <= min(ids) <= max(ids) < self._model.n_vocab:
            raise JobRefused(
                "invalid", f"a token id in {where} is not below the vocabulary's {self._model.n_vocab}"
            )

    def _grammar(self, work: Generation, resume: tuple[int, ...]) -> Grammar | None:
        if work.constraint is None:
            return None
        try:
            grammar = Grammar(self._model, gbnf_source(work.constraint))
        except NativeError as error:
            raise JobRefused("invalid", f"the constraint is not usable: {error}") from error
        try:
            self._follow(grammar, resume)
        except JobRefused:
            grammar.close()
            raise
        except GrammarTooCostly as error:
            grammar.close()
            raise JobRefused("invalid", str(error)) from error
        return grammar

    def _follow(self, grammar: Grammar, resume: tuple[int, ...]) -> None:
        for place, token in enumerate(resume):
            last = place == len(resume) - 1
            if not grammar.advance(token) and not (last and token in self._model.eog):
                raise JobRefused("invalid", f"token {place} of those to resume from breaks the constraint")
