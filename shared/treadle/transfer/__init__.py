"""Blobs on their way between machines: in chunks with offsets, resumed after any interruption, hashed."""

from treadle.transfer.download import download_files
from treadle.transfer.node_cache import NodeCache
from treadle.transfer.upload import upload_file

__all__ = ["NodeCache", "download_files", "upload_file"]
