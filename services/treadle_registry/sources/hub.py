"""A model of a Hugging Face hub, as files of the Hugging Face cache."""

from __future__ import annotations

from treadle.errors import InvalidArgument
from treadle.models.encoder_config import EncoderConfig
from treadle.models.families import parse_any_config
from treadle_registry.formats.huggingface_folder import MAX_FILES, check_config
from treadle_registry.formats.json_files import read_json
from treadle_registry.formats.task_facts import read_encoder
from treadle_registry.operations.progress import Report, unheard
from treadle_registry.sources.hub_cached import cached_files
from treadle_registry.sources.hub_client import HubClient, Listing
from treadle_registry.sources.hub_download import HubDownload
from treadle_registry.sources.hub_files import (
    MAX_TEXT,
    check_required,
    check_shards,
    is_index,
    text_files,
    weight_names,
    weights_file,
)
from treadle_registry.sources.hub_headers import hub_headers
from treadle_registry.sources.hub_source import HubSource
from treadle_registry.sources.opened import ModelFiles, OpenedSource


def open_hub(source: HubSource, client: HubClient, report: Report = unheard) -> OpenedSource:
    """Brings what the cache lacks of the model, or takes what it has where nothing may leave the machine.

    Everything that can be told without the weights is told before they are fetched. Raises TreadleError; what
    has come by then stays in the cache.
    """
    if source.local_files_only or client.offline:
        return cached_files(source, client).opened(linked=True)
    listing = client.listing(source)
    download = HubDownload(client, source, listing, report)
    chosen = weights_file(source, listing.files)
    texts = [] if source.gguf_file else _texts(listing, chosen)
    files = download.fetch(texts)
    if files:
        config = check_config(files)
        if config.get("quantization_config"):
            # What exactly they are, and that they cannot be served, stands in the headers.
            with hub_headers(source, client) as headers:
                headers.opened(linked=False).model.check()
        model = parse_any_config(config)
        if isinstance(model, EncoderConfig):
            tokenizer = "tokenizer_config.json"
            read_encoder(files, config, model, read_json(files[tokenizer]) if tokenizer in files else {})
    weights = weight_names(chosen, files)
    check_shards(weights, chosen, listing.files)
    files |= download.fetch(weights)
    sha256 = {name: listing.files[name].sha256 for name in files if listing.files[name].sha256}
    return ModelFiles(source.at(listing.commit), files, weights, sha256).opened(linked=True)


def _texts(listing: Listing, chosen: str) -> list[str]:
    check_required(listing.files)
    names = text_files(listing.files) + ([chosen] if is_index(chosen) else [])
    if len(names) > MAX_FILES:
        raise InvalidArgument(
            f"the repository has {len(names)} files beside its weights; at most {MAX_FILES} are taken",
            reason="TOO_MANY_FILES",
        )
    for name in names:
        if listing.files[name].size > MAX_TEXT:
            raise InvalidArgument(f"{name} is larger than {MAX_TEXT} bytes", reason="FILE_TOO_LARGE")
    return names
