"""`generate`: text from a model, with or without an adapter, as it is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fourbit.loading import folder_kind, holds_tokenizer, load_model, load_tokenizer


def load_for_generation(
    model: str | Path, *, adapter: str | Path | None = None, dtype: Any = None
) -> tuple[Any, Any]:
    """A model ready to generate, and its tokenizer.

    Args:
        model: a folder: 4-bit, or plain as `export_merged` writes it.
        adapter: a folder with an adapter for it. Its tokenizer is used if it has one.
        dtype: of the computation; None is float32 on a CPU and the folder's own on a GPU.

    Returns:
        The model, in eval mode and on the GPU if there is one, and the tokenizer.

    Raises:
        FileNotFoundError: for a folder that is missing or incomplete.
        CheckpointError: for an adapter that does not fit the model.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    if dtype is None and not on_gpu:
        dtype = torch.float32
    folder = Path(model)
    folder_kind(folder)
    own = adapter is not None and holds_tokenizer(Path(adapter))
    tokenizer = load_tokenizer(Path(adapter) if own and adapter is not None else folder)
    loaded = load_model(folder, dtype)
    if adapter is not None:
        from fourbit.lora import load_adapter

        load_adapter(loaded, adapter, trainable=False)
    loaded.eval()
    return loaded.to("cuda") if on_gpu else loaded, tokenizer


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str | Sequence[dict[str, str]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    chat: bool | None = None,
    stream: Callable[[str], None] | None = None,
) -> str:
    """Continue a text, or answer a question.

    Args:
        model: of transformers, on any device.
        tokenizer: its tokenizer.
        prompt: a text, or messages ``[{"role": ..., "content": ...}, ...]``.
        max_new_tokens: the answer's greatest length.
        temperature: 0 takes the likeliest token each time; above 0 draws, the wilder the higher.
        top_p: draw only from the likeliest tokens that hold this much probability together.
        seed: of the draws; None draws differently each time.
        chat: whether a text is a user's message to be put into the chat template; None means
            whenever the tokenizer has one.
        stream: called with each piece of the answer as soon as it is there.

    Returns:
        The answer, without the prompt and without special tokens.

    Raises:
        ValueError: for an option out of range, an empty prompt, or a chat without a template.
    """
    import torch

    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}; it must be at least 0")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1")
    ids = _encode(tokenizer, prompt, chat).to(model.device)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    if temperature == 0:
        sampling = {"do_sample": False, "temperature": None, "top_p": None}
    ends = _end_tokens(model, tokenizer)
    was_training = model.training
    model.eval()
    try:
        # The caller's random state is not ours to change.
        with torch.random.fork_rng(enabled=seed is not None), torch.inference_mode():
            if seed is not None:
                torch.manual_seed(seed)
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                eos_token_id=ends or None,
                pad_token_id=tokenizer.pad_token_id if ends == [] else ends[0],
                streamer=None if stream is None else _streamer(tokenizer, stream),
                use_cache=True,
                top_k=None if temperature == 0 else 0,
                **sampling,
            )
    finally:
        model.train(was_training)
    answer: str = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return answer


def _encode(tokenizer: Any, prompt: str | Sequence[dict[str, str]], chat: bool | None) -> Any:
    """Token ids [1, length] of a prompt."""
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise ValueError("the prompt is empty")
    if isinstance(prompt, str):
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise ValueError("the prompt is not UTF-8 text") from None
    as_chat = not isinstance(prompt, str) or (
        bool(tokenizer.chat_template) if chat is None else chat
    )
    if not as_chat:
        return tokenizer(prompt, return_tensors="pt").input_ids
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template; give the whole text the model shall go on with, "
            "with --raw (chat=False)"
        )
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    encoded = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return encoded["input_ids"]


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: the tokenizer's, and those the model names."""
    named = getattr(model.generation_config, "eos_token_id", None)
    ends = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    return list(dict.fromkeys(int(token) for token in ends if token is not None))


def _streamer(tokenizer: Any, stream: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class _Streamer(TextStreamer):  # type: ignore[misc]  # transformers has no types
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                stream(text)

    return _Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
