"""Weights from the Hugging Face hub: found, and staged once into the store, so that ranks never download."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.storage import StoreError, open_store
from jobs.errors import NotReady

if TYPE_CHECKING:
    from core.recipe import Recipe

FILE = "model.safetensors"
TIMEOUT_S = 4.0
HOW = "on a machine with network: hf download {hub_id} model.safetensors (licence to accept: hf auth login first)"


def hub_id(model: str, weights: str) -> str:
    """Repository of the weights `hub` and `hub:<id>`; empty for other weights."""
    scheme, _, name = weights.partition(":")
    return (name or f"timm/{model}") if scheme == "hub" else ""


def source(repository: str) -> str:
    """Where the hub has it: timm's quick-GELU towers lie with their plain namesakes, and names without a tag mean
    timm's default weights."""
    owner, _, name = repository.partition("/")
    if owner != "timm":
        return repository
    import timm

    config = timm.get_pretrained_cfg(name)
    return str((config and config.hf_hub_id) or repository)


def staged_key(repository: str) -> str:
    """Where a store keeps the weights of a repository."""
    return f"weights/{repository.replace('/', '--')}/{FILE}"


def unreachable(repository: str) -> str:
    """Why weights that are not staged cannot be; empty when they are in the local cache or can be downloaded."""
    if _cached(repository) or _cached(repository := source(repository)):
        return ""
    what = f"the weights {repository} are neither in the store nor in the local hub cache"
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return f"{what}, and HF_HUB_OFFLINE forbids to download them"
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(repository, FILE), timeout=TIMEOUT_S)
    except Exception as error:  # whatever the network stack raises: the hub cannot be reached from here
        return _why(error, repository) or f"{what}, and the hub does not answer ({type(error).__name__})"
    return ""


def _why(error: Exception, repository: str) -> str:
    """What the hub answers instead of a file; empty when it is no answer of the hub."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return _why(error.__cause__, repository)  # a download that says what is not there, and not what was answered
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if isinstance(error, errors.GatedRepoError):
        return f"the weights {repository} need their licence accepted and a login"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the hub has no public repository {repository}"
    if isinstance(error, errors.RemoteEntryNotFoundError) or status == 404:
        return f"the hub's repository {repository} has no file {FILE}; download another one of it and name that file"
    if status == 429:
        return f"the hub answers 429, too many requests, for {repository}: wait some minutes, or hf auth login first"
    return f"the hub answers {status} for {repository}: see https://status.huggingface.co" if status else ""


def outline(repository: str) -> dict[str, Any]:
    """Names and shapes of weights that are not staged, from the local cache or the hub, of which few bytes are read.

    Raises WeightsError, StoreError.
    """
    import torch
    from huggingface_hub import HfApi

    from core.models import files

    there = source(repository)
    if path := _cached(repository) or _cached(there):
        with path.open("rb") as file:
            return files.outline(file, path.stat().st_size, str(path))
    try:
        found = HfApi().parse_safetensors_file_metadata(there, FILE, timeout=TIMEOUT_S)
        return {name: torch.empty(tensor.shape, device="meta") for name, tensor in found.tensors.items()}
    except Exception as error:  # as in `unreachable`
        why = _why(error, there) or f"the header of {there} could not be read ({type(error).__name__})"
        raise StoreError(why) from None


def stage(recipe: Recipe, root: str, say: Callable[[str], None]) -> None:
    """Copy the hub weights that a recipe names into the store, downloading them where needed.  Raises NotReady."""
    from jobs.inputs import weights_fields

    store = open_store(root)
    for field, model, weights in weights_fields(recipe):
        repository = hub_id(model, weights)
        if repository and store.size(staged_key(repository)) is None:
            say(f"staging {repository} into {store.uri}")
            there = source(repository)
            store.put_file(staged_key(repository), _cached(repository) or _cached(there) or _download(field, there))


def _cached(repository: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, FILE)
    return Path(found) if isinstance(found, str) else None


def _download(field: str, repository: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, FILE))
    except Exception as error:
        why = _why(error, repository) or f"{repository} could not be downloaded: {type(error).__name__}: {error}"
        raise NotReady(f"{field}: {why}") from error
