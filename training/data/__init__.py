"""Data: pictures to shards, shards to image batches, and token stores to token batches."""

from spectralar.training.data.images import Crop, ImageError, apply_crop, decode_image, encode_for_shard
from spectralar.training.data.loader import ImageLoader, LoaderConfig, crop_batches, crop_requests, evaluation_batches
from spectralar.training.data.shard_set import ShardSet
from spectralar.training.data.shards import ShardProgress, shards_command, write_shards
from spectralar.training.data.tar_index import ShardError
from spectralar.training.data.tokens import TokenBatch, TokenLoader, TokenStore, TokenWriter
from spectralar.training.data.workers import Batch

__all__ = [
    "Batch",
    "Crop",
    "ImageError",
    "ImageLoader",
    "LoaderConfig",
    "ShardError",
    "ShardProgress",
    "ShardSet",
    "TokenBatch",
    "TokenLoader",
    "TokenStore",
    "TokenWriter",
    "apply_crop",
    "crop_batches",
    "crop_requests",
    "decode_image",
    "encode_for_shard",
    "evaluation_batches",
    "shards_command",
    "write_shards",
]
