"""Text from a packed model, with an adapter or without: the first thing that anyone tries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from surogate_load.architecture import need_transformers
from surogate_load.errors import ForeignTextError, NoTokenizerError
from surogate_load.loading import load_model
from surogate_load.local import local_directory
from surogate_load.saved_adapter import check_saved, with_adapter
from surogate_load.tokenizer import check_tokens, need_tokenizer


def generate(
    artifact: str | Path,
    prompt: str,
    *,
    adapter: str | Path | None = None,
    device: str = "cpu",
    chat: bool | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int | None = None,
    streamer: Any = None,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """What the model says after a prompt.

    Args:
        artifact: directory of the artifact, with the tokenizer that the quantizer copied, or its name on the Hub.
        prompt: text.
        adapter: directory of a PEFT adapter.
        device: where the model runs.
        chat: put the prompt into the tokenizer's chat template; by default if it has one.
        max_new_tokens: at most.
        temperature: 0 takes the likeliest token each time.
        seed: of what is drawn otherwise; None draws anew each time.
        streamer: of transformers, which gets the tokens as they come; made from the tokenizer if callable.
        revision: see `load_model`.
        token: see `load_model`.

    Raises:
        NoTokenizerError: the artifact has none, or no chat template where `chat` asks for it.
        ForeignTextError: the prompt is empty, or has tokens that the model doesn't know.
        UnreadableAdapterError: there is no such adapter, or it isn't this model's.
        Everything that `load_model` raises.
    """
    if adapter is not None:
        check_saved(adapter)
    need_transformers()
    directory = local_directory(artifact, revision, token)
    tokenizer = need_tokenizer(directory)
    if chat and not tokenizer.chat_template:
        raise NoTokenizerError(f"{artifact}: its tokenizer has no chat template; leave --chat out")
    model: Any = load_model(directory, "bf16", device)
    if adapter is not None:
        model = with_adapter(model, adapter)
    given = _encode(tokenizer, prompt, bool(tokenizer.chat_template) if chat is None else chat).to(device)
    _check(given["input_ids"], model)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with torch.inference_mode(), torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        ids = model.eval().generate(
            **given,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            streamer=streamer(tokenizer) if callable(streamer) else streamer,
            **sampling,
        )
    said: str = tokenizer.decode(ids[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return said


def _check(ids: torch.Tensor, model: Any) -> None:
    if not ids.numel():
        raise ForeignTextError("the prompt has no tokens; write something in it")
    check_tokens(ids, model.get_input_embeddings().num_embeddings)


def _encode(tokenizer: Any, prompt: str, chat: bool) -> Any:
    if not chat:
        return tokenizer(prompt, return_tensors="pt")
    turn = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
