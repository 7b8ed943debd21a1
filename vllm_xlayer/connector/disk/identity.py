"""Whose KV an engine computes: what must be equal before one engine may use another's rows."""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm import envs
from vllm.config import AttentionConfig, LoadConfig, ModelConfig, SpeculativeConfig, VllmConfig

from ... import kv_scales
from ...attention.newest import newest_tokens_of
from ...compat.rows import nvfp4_pages
from ...config import Config
from ...layout import RowDescriptor
from ...nvfp4 import KV_DTYPES
from .format import TierIdentity
from .weight_files import NoIdentity, loaded_weights

SAFE_HASHES = ("sha256", "sha256_cbor")
"""Hash functions of vLLM's under which different prompts do not get the same key, even if someone tries.
Their chains begin alike in every process, unless PYTHONHASHSEED differs: then nothing is found."""
FOLDER_FORMATS = (
    "auto", "bitsandbytes", "dummy", "fastsafetensors", "gguf", "hf", "instanttensor", "mistral", "npcache",
    "pt", "runai_streamer", "runai_streamer_sharded", "safetensors", "sharded_state",
)  # fmt: skip
"""Load formats that take weights from the files of the model's folder, or make them up (dummy). Others take
them from a file of their own (tensorizer), another process (ipc_cache), or wherever a plugin does."""


def tier_identity(
    vllm_config: VllmConfig, layout: RowDescriptor, blocks_per_chunk: int, one_copy: bool = False
) -> TierIdentity:
    """The identity of a running engine.

    Args:
        one_copy: an entry has one row of each block, which is every rank's.

    Raises:
        NoIdentity: something shapes this engine's KV that keys and identity do not cover.
    """
    if problems := list(_problems(vllm_config)):
        raise NoIdentity("; ".join(problems))
    model, cache = vllm_config.model_config, vllm_config.cache_config
    return TierIdentity(
        layout=layout.fingerprint + (", one row for all ranks" if one_copy else ""),
        kv_dtype="+".join(sorted({str(cache.cache_dtype), *(spec.dtype for spec in layout.attention)})),
        model=str(model.model)[-200:],
        settings=_settings_digest(vllm_config, code_digest(_folder_of(model)), layout.has_opaque),
        weights=loaded_weights(weights_folder(vllm_config)),
        tp_size=vllm_config.parallel_config.tensor_parallel_size,
        block_size=layout.groups[0].block_size,
        blocks_per_chunk=blocks_per_chunk,
    )


def _problems(vllm_config: VllmConfig):
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    multimodal = vllm_config.model_config.multimodal_config
    if (drafter := drafter_with_kv(vllm_config)) is not None and drafter.draft_model_config is None:
        yield (
            f"speculative decoding: expected {', '.join(DRAFTERS_WITHOUT_KV)} or a draft model, whose "
            f"weights can be told apart, got method {drafter.method}"
        )
    if (
        multimodal is not None
        and multimodal.mm_encoder_attn_dtype
        and not multimodal.mm_encoder_fp8_scale_path
    ):
        yield "mm_encoder_attn_dtype without mm_encoder_fp8_scale_path takes scales from the first images"
    encoders = vllm_config.ec_transfer_config
    if encoders is not None and encoders.is_ec_consumer:
        yield (
            "ec_transfer_config: what other engines' encoders make of images, audio and video is not known "
            "here by their weights"
        )
    if cache.prefix_caching_hash_algo not in SAFE_HASHES:
        yield (
            f"prefix_caching_hash_algo: expected one of {', '.join(SAFE_HASHES)}, "
            f"got {cache.prefix_caching_hash_algo}"
        )
    if parallel.world_size != parallel.tensor_parallel_size:
        yield (
            f"expected tensor parallelism only, got {parallel.world_size} ranks with tensor_parallel_size "
            f"{parallel.tensor_parallel_size}: the other ranks hold other layers, and nothing here says of "
            "an entry which layers it has"
        )


def shaping_settings(vllm_config: VllmConfig) -> dict[str, Any]:
    """Everything but layout, weights and the fields of TierIdentity that shapes the values of a token's KV.

    What is in a block's key already is not here: tokens, names of multimodal items, cache salts, prompt
    embeddings (all of them by vLLM), the hash function and its seed (PYTHONHASHSEED). What neither this nor
    the key covers turns the tier off: `_problems`. Not here either: what changes only how fast or in which
    order the same sums are made, as the kind of GPU, CUDA graphs or the size of a batch do.
    """
    model, load, cache = vllm_config.model_config, vllm_config.load_config, vllm_config.cache_config
    parallel, attention = vllm_config.parallel_config, vllm_config.attention_config
    multimodal = model.multimodal_config
    load_format = _load_format(load)
    settings = {
        # Other versions may compute the same model in another way, and have.
        "vllm": version("vllm"),
        "config": model.hf_config.to_dict(),
        "model_impl": model.model_impl,
        "runner": model.runner_type,
        "convert": model.convert_type,
        "class_overrides": model.model_class_overrides,
        "dtype": model.dtype,
        "quantization": model.quantization,
        "quantization_config": model.quantization_config,
        "load_format": load_format,
        "load_config": load.model_loader_extra_config,
        "seed": model.seed if load_format == "dummy" else None,
        "max_model_len": model.max_model_len,  # some ways of scaling positions depend on it
        "sliding_window": [model.disable_sliding_window, cache.sliding_window],
        "skipped_layers": cache.kv_cache_dtype_skip_layers,
        "scale_choice": Config.load().scale_choice.name,
        "backend": attention.backend,
        "backend_per_kind": attention.backend_per_kind,
        "context_parallel": [
            parallel.decode_context_parallel_size,
            parallel.prefill_context_parallel_size,
            parallel.cp_kv_cache_interleave_size,
        ],
        "platform": vllm_config.additional_config,
        "multimodal": {} if multimodal is None else {n: getattr(multimodal, n) for n in MULTIMODAL},
    }
    # What is said only where it is so: what others have on disk stays valid.
    if asked := _asked_of_attention(attention):
        settings["attention"] = asked
    if str(cache.cache_dtype) in KV_DTYPES:
        settings["kv_scales"] = kv_scales.digest(Config.load().kv_scales)
        settings["nvfp4_pages"] = nvfp4_pages()
        if newest_tokens := newest_tokens_of(vllm_config):
            settings["newest_tokens"] = newest_tokens
    return settings


ATTENTION = (
    "disable_flashinfer_q_quantization",
    "flash_attn_version",
    "indexer_sparse_logits",
    "minimax_m3_msa_decode_backend",
    "mla_prefill_backend",
    "trtllm_ragged_backend",
    "use_non_causal",
    "use_prefill_query_quantization",
    "use_trtllm_attention",
)
"""Settings of vLLM's, beside the backends, by which attention rounds otherwise or sees other keys."""


def _asked_of_attention(given: AttentionConfig) -> dict[str, Any]:
    """Of `ATTENTION`, what is not vLLM's default."""
    default = AttentionConfig()
    names = [name for name in ATTENTION if hasattr(default, name)]
    return {n: getattr(given, n) for n in names if getattr(given, n) != getattr(default, n)}


MULTIMODAL = (
    "media_io_kwargs",
    "mm_device_do_normalize",
    "mm_processor_kwargs",
    "mm_encoder_attn_backend",
    "mm_encoder_attn_dtype",
    "mm_encoder_fp8_scale_path",
    "mm_encoder_tp_mode",
    "video_pruning_method",
    "video_pruning_rate",
)
"""Settings of vLLM's that shape an item's embeddings and are not in its name."""


def state_settings(vllm_config: VllmConfig) -> dict[str, Any]:
    """What shapes the states of a hybrid model beside `shaping_settings` and the layout.

    The layout says their shapes, dtypes and kind. Not a part of the former, so that what engines without
    states have on disk stays valid.
    """
    mamba, cache = vllm_config.mamba_config, vllm_config.cache_config
    return {
        "backend": mamba.backend,
        "stochastic_rounding": [mamba.enable_stochastic_rounding, mamba.stochastic_rounding_philox_rounds],
        "replayssm": cache.use_replayssm,
        "match_unit": cache.prefix_match_unit,
    }


DRAFTERS_WITHOUT_KV = ("ngram", "ngram_gpu", "suffix")
"""vLLM's methods of speculative decoding that keep nothing in the KV cache."""


def drafter_with_kv(vllm_config: VllmConfig) -> SpeculativeConfig | None:
    """Settings of the model that drafts and whose KV is in the rows; None where there is none."""
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method in DRAFTERS_WITHOUT_KV:
        return None
    return speculative


def draft_settings(drafter: SpeculativeConfig, load: LoadConfig) -> dict[str, Any]:
    """What shapes the KV of a model that drafts, beside the layout, which says its layers.

    Its KV at a block's last position may depend on the token after, which is in no key. A draft from it may
    be worse, never an answer: the served model checks every draft.

    Raises:
        NoIdentity: its files are not on this host.
    """
    draft = drafter.draft_model_config
    assert draft is not None  # else `_problems` has said so
    return {
        "method": drafter.method,
        "tokens": drafter.num_speculative_tokens,
        "parallel": drafter.parallel_drafting,
        "config": draft.hf_config.to_dict(),
        "dtype": draft.dtype,
        "quantization": draft.quantization,
        "code": code_digest(_folder_of(draft)),
        "weights": loaded_weights(_folder_of(draft, load.download_dir)),
    }


def _settings_digest(vllm_config: VllmConfig, code: str, states: bool) -> str:
    shaping: list[Any] = [code, shaping_settings(vllm_config)]
    if states:
        shaping.append(state_settings(vllm_config))
    if (drafter := drafter_with_kv(vllm_config)) is not None:
        load = getattr(drafter, "draft_load_config", None) or vllm_config.load_config
        shaping.append(draft_settings(drafter, load))
    text = json.dumps(shaping, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def weights_folder(vllm_config: VllmConfig) -> Path:
    """Where the files are that the model's weights are loaded from.

    Raises:
        NoIdentity: they are not on this host, or weights come from elsewhere.
    """
    load = vllm_config.load_config
    if (load_format := _load_format(load)) not in FOLDER_FORMATS:
        raise NoIdentity(
            "load_format: expected one that reads the files of the model's folder "
            f"({', '.join(FOLDER_FORMATS)}), got {load_format}, which may take weights from elsewhere"
        )
    return _folder_of(vllm_config.model_config, load.download_dir)


def _load_format(load: LoadConfig) -> str:
    return str(getattr(load.load_format, "value", load.load_format))


def _folder_of(model: ModelConfig, cache: str | None = None) -> Path:
    """cache: of Hugging Face's; None is the usual one, where vLLM always has configurations and code from."""
    if Path(model.model).is_dir():
        return Path(model.model)
    if envs.VLLM_USE_MODELSCOPE:
        raise NoIdentity(f"the files of model {model.model} are ModelScope's, which nothing here looks for")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(model.model, revision=model.revision, cache_dir=cache, local_files_only=True)
        )
    except (OSError, ValueError) as error:
        raise NoIdentity(f"the files of model {model.model} are not found here: {error}") from error


def code_digest(folder: Path) -> str:
    """16 hex digits over a model folder's code and settings of its processors (images, audio, video)."""
    digest = hashlib.sha256()
    for path in sorted({*folder.glob("*processor*.json"), *folder.glob("*.py")}):
        content = path.read_bytes()
        digest.update(json.dumps([path.name, len(content)]).encode() + content)
    return digest.hexdigest()[:16]
