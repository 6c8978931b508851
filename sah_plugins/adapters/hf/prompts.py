"""From a request to token ids: one tokenisation of the whole prompt, and where the context ends in
it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from sah_core.errors import ContextTooLongError, ParameterError, RequestError, short_repr
from sah_core.requests import TRUNCATIONS, Request, Truncation

REQUEST_OPTIONS = ("max_context_length", "truncation", "chat", "prefill_chunk_size")


@attrs.frozen
class Healed:
    """What token healing did to a prompt.

    Attributes:
        tail: The token that the prompt's last one took the place of; they may be the same.
        seconds: Time that it took.
    """

    tail: int
    seconds: float


@attrs.frozen
class Prompt:
    """The tokens of one question's prompt.

    Attributes:
        ids: Token ids of the whole prompt, tokenised in one go.
        context_tokens: How many leading tokens lie inside the context (template head and BOS
            included).
        text: What was tokenised.
        template_end: Where the template ends in it, behind which stands the answer prefix; 0
            without template.
        healed: Set where its last token was chosen anew.
    """

    ids: tuple[int, ...]
    context_tokens: int
    text: str = attrs.field(default="", repr=False)
    template_end: int = 0
    healed: Healed | None = None

    @property
    def given(self) -> str:
        """The end of the text, as far as it is the request's own words."""
        return self.text[self.template_end :]


def build_prompts(
    request: Request,
    tokenizer: Any,
    *,
    max_context_length: int | None = None,
    truncation: Truncation | None = None,
    chat: bool | None = None,
) -> list[Prompt]:
    """The prompts of a request, one per question.

    Args:
        request: What is asked.
        tokenizer: A transformers tokenizer.
        max_context_length: Tokens of context to keep, or None.
        truncation: Overrides the request's.
        chat: Overrides the request's.

    Raises:
        ContextTooLongError: If the context is longer than ``max_context_length`` and may not be
            cut.
        RequestError: If the chat template does not exist, or does not contain the context as it is.
    """
    if max_context_length is not None and (
        isinstance(max_context_length, bool)
        or not isinstance(max_context_length, int)
        or max_context_length < 1
    ):
        raise ParameterError(
            "request", "max_context_length", max_context_length, "an integer >= 1, or none"
        )
    if truncation is not None and truncation not in TRUNCATIONS:
        raise RequestError(
            f"truncation {truncation!r} is not known; use one of {', '.join(TRUNCATIONS)}"
        )
    chat = request.chat if chat is None else chat
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise RequestError("the tokenizer has no chat template; use chat=False")
    chat = has_template if chat is None else chat
    if request.system is not None and not chat:
        raise RequestError("a system message needs a chat template")
    if request.turns and not chat:
        raise RequestError("turns of a conversation need a chat template")
    policy = truncation or request.truncation or "middle"
    context = cut_context(request.context, tokenizer, max_context_length, policy)
    return [
        build_prompt(request, context, question, prefix, tokenizer, chat)
        for question, prefix in zip(request.question_list, request.prefixes, strict=True)
    ]


def cut_context(context: str, tokenizer: Any, limit: int | None, policy: Truncation) -> str:
    """The context cut to ``limit`` tokens, at character positions of token borders.

    Raises:
        ContextTooLongError: If it is longer and the policy is ``none``.
    """
    if limit is None or not context:
        return context
    spans = encode(tokenizer, context, special=False)[1]
    if len(spans) <= limit:
        return context
    if policy == "none":
        raise ContextTooLongError(len(spans), limit, "max_context_length")
    head = limit if policy == "head" else limit // 2
    tail = limit - head
    start = context[: spans[head - 1][1]] if head else ""
    return start + (context[spans[len(spans) - tail][0] :] if tail else "")


def build_prompt(
    request: Request, context: str, question: str, prefix: str, tokenizer: Any, chat: bool
) -> Prompt:
    """Tokenise one prompt as a whole and find the last token that lies inside the context.

    Raises:
        RequestError: If the template does not take the messages, or the prompt has no token.
    """
    separator = request.separator if context else ""
    body = context + separator + question
    if chat:
        text = rendered(request, body, tokenizer)
        begin, shift = find_body(text, body)
        end = begin + max(0, len(context) - shift)
        template_end = len(text)
        text += prefix
    else:
        text = body + (request.separator if prefix else "") + prefix
        end, template_end = len(context), 0
    ids, spans = encode_prompt(tokenizer, text)
    inside = 0
    for _, stop in spans:
        if stop > end:
            break
        inside += 1
    if not ids:
        raise RequestError("the tokenizer makes no token of this prompt")
    # the question's forward pass needs a token
    inside = min(inside, len(ids) - 1) if context else 0
    return Prompt(tuple(ids), inside, text, template_end)


def stripped(prompt: Prompt, tokenizer: Any) -> Prompt:
    """A prompt without the whitespace at its end, as far as that is the request's; a prompt that
    ends with the template stays as it is.
    """
    given = prompt.given.rstrip()
    if not given or given == prompt.given:
        return prompt
    text = prompt.text[: prompt.template_end] + given
    ids, _ = encode_prompt(tokenizer, text)
    pairs = enumerate(zip(ids, prompt.ids, strict=False))
    common = next((i for i, (here, there) in pairs if here != there), len(ids))
    inside = min(prompt.context_tokens, common, len(ids) - 1)
    return attrs.evolve(prompt, ids=tuple(ids), context_tokens=inside, text=text)


def rendered(request: Request, body: str, tokenizer: Any) -> str:
    """The conversation in the chat template, ``body`` as the user's last message.

    Raises:
        RequestError: If the template refuses it, such as one that knows no system message.
    """
    from jinja2 import TemplateError

    messages = [{"role": turn.role, "content": turn.content} for turn in request.turns]
    messages.append({"role": "user", "content": body})
    if request.system is not None:
        messages.insert(0, {"role": "system", "content": request.system})
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise RequestError(f"the chat template refuses messages of {roles}: {error}") from error
    return str(text)


def find_body(text: str, body: str) -> tuple[int, int]:
    """Where the user's text starts in the rendered template, and how many leading characters it
    lost there.

    Raises:
        RequestError: If it is not there as it is.
    """
    for candidate in (body, body.rstrip(), body.strip()):
        at = text.rfind(candidate)
        if at >= 0:
            lost = len(body) - len(body.lstrip()) if candidate == body.strip() else 0
            return at, 0 if candidate == body else lost
    raise RequestError("the chat template changes the context; use chat=False")


def encode_prompt(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids and spans of a whole prompt, which may hold its BOS already."""
    bos = getattr(tokenizer, "bos_token", None)
    return encode(tokenizer, text, special=not (bos and text.startswith(bos)))


def encode(tokenizer: Any, text: str, *, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids and the character span of each; at most one BOS.

    Tokenizers without offsets (not the fast kind) get spans from decoding ever longer prefixes.
    """
    fast = bool(getattr(tokenizer, "is_fast", False))
    made = tokenizer(text, add_special_tokens=special, return_offsets_mapping=fast, verbose=False)
    ids = list(made["input_ids"])
    if fast:
        spans = [(int(a), int(b)) for a, b in made["offset_mapping"]]
    else:
        spans, at = [], 0
        for index in range(len(ids)):
            end = len(tokenizer.decode(ids[: index + 1], skip_special_tokens=True))
            spans.append((at, max(at, end)))
            at = max(at, end)
    bos, eos = getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "eos_token_id", None)
    while len(ids) > 1 and bos is not None and ids[0] == ids[1] == bos:
        ids, spans = ids[1:], spans[1:]
    if (
        special
        and eos is not None
        and ids
        and ids[-1] == eos
        and not text.endswith(str(tokenizer.eos_token))
    ):
        ids, spans = ids[:-1], spans[:-1]  # an EOS that the tokenizer adds would end the prompt
    return ids, spans


def request_options(request_kwargs: Mapping[str, Any] | None) -> tuple[dict[str, Any], int | None]:
    """The options for building prompts, and the tokens per prefill step.

    Raises:
        RequestError: For an option that is not known.
        ParameterError: For a value that is not allowed.
    """
    if request_kwargs is not None and not isinstance(request_kwargs, Mapping):
        raise RequestError(
            f"the request options are {short_repr(request_kwargs)}; expected a mapping from names "
            "to values"
        )
    options = dict(request_kwargs or {})
    unknown = sorted(set(options) - set(REQUEST_OPTIONS))
    if unknown:
        raise RequestError(
            f"request option {unknown[0]!r} is not known; options are {', '.join(REQUEST_OPTIONS)}"
        )
    chunk = options.pop("prefill_chunk_size", None)
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise ParameterError("request", "prefill_chunk_size", chunk, "an integer >= 1")
    chat = options.get("chat")
    if chat is not None and not isinstance(chat, bool):
        raise ParameterError("request", "chat", chat, "true, false or none")
    return options, chunk
