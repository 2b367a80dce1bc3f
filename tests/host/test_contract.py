"""Saved graphs are a contract: ids, names, types and their order are never changed, only added to.

A change of FROZEN that is more than a new node, or a new optional input or output at the end,
breaks the graphs that people have saved.
"""

from __future__ import annotations

import asyncio
import inspect

import pytest
from atelier.trainers.config import PROMPT_LENGTH, JobSettings, Length, TrainSettings
from atelier.trainers.lora_settings import LoraSettings
from atelier.trainers.optimizer_settings import OptimizerSettings
from atelier.trainers.preservation_settings import PreservationSettings
from atelier.trainers.speed_settings import SpeedSettings

FROZEN = {
    "AtelierLoadQuantizedFlux": (
        [
            *("model COMBO", "format COMBO", "compute_dtype COMBO", "keep_copy? BOOLEAN"),
            *("quantize_on? COMBO", "reserve_gb? FLOAT", "block_streaming? COMBO"),
            "hub_id? STRING",
        ],
        ["MODEL MODEL", "CLIP CLIP", "VAE VAE"],
    ),
    "AtelierLoadQuantizedTextEncoders": (
        [
            *("clip_l COMBO", "t5xxl COMBO", "format COMBO", "keep_copy? BOOLEAN"),
            "quantize_on? COMBO",
        ],
        ["CLIP CLIP"],
    ),
    "AtelierImageFolderDataset": (
        [
            *("folder COMBO", "width INT", "height INT", "mode COMBO", "repeats INT"),
            *("trigger STRING", "missing_captions COMBO"),
            *("captions? ATELIER_CAPTION_SETTINGS", "pictures? ATELIER_PICTURE_SETTINGS"),
            *("on_bad_file? COMBO", "more_sizes? STRING", "masks? COMBO", "references? COMBO"),
        ],
        ["dataset ATELIER_DATASET"],
    ),
    "AtelierScheduleDataset": (
        [
            *("dataset ATELIER_DATASET", "probability FLOAT", "start_step INT"),
            *("is_regularization BOOLEAN", "is_prior? BOOLEAN"),
        ],
        ["dataset ATELIER_DATASET"],
    ),
    "AtelierCombineDatasets": (
        [
            *("dataset_1 ATELIER_DATASET", "dataset_2 ATELIER_DATASET"),
            *(f"dataset_{number}? ATELIER_DATASET" for number in range(3, 7)),
        ],
        ["dataset ATELIER_DATASET"],
    ),
    "AtelierImportDataset": (["file COMBO", "on_bad_file COMBO"], ["dataset ATELIER_DATASET"]),
    "AtelierHubDataset": (
        [
            *("folder COMBO", "width INT", "height INT", "mode COMBO", "repeats INT"),
            *("trigger STRING", "missing_captions COMBO", "on_bad_file COMBO"),
            *("captions? ATELIER_CAPTION_SETTINGS", "pictures? ATELIER_PICTURE_SETTINGS"),
            "hub_id? STRING",
        ],
        ["dataset ATELIER_DATASET"],
    ),
    "AtelierImagesToDataset": (
        [
            *("images IMAGE", "texts STRING", "width INT", "height INT", "mode COMBO"),
            *("repeats INT", "trigger STRING", "masks? MASK"),
            *("captions? ATELIER_CAPTION_SETTINGS", "pictures? ATELIER_PICTURE_SETTINGS"),
        ],
        ["dataset ATELIER_DATASET"],
    ),
    "AtelierInspectDataset": (
        [
            *("dataset ATELIER_DATASET", "length INT", "batch_size INT"),
            *("gradient_accumulation INT", "max_pictures INT", "page INT"),
        ],
        ["sheet IMAGE", "report STRING"],
    ),
    "AtelierCaptionSettings": (
        [
            *("source COMBO", "instance_prompt STRING", "column STRING", "lines COMBO"),
            *("prefix STRING", "suffix STRING", "shuffle BOOLEAN", "keep_tokens INT"),
            *("variants INT", "separator STRING", "dropout FLOAT"),
        ],
        ["captions ATELIER_CAPTION_SETTINGS"],
    ),
    "AtelierPictureSettings": (
        [
            *("crop COMBO", "filter COMBO", "max_side INT", "flip BOOLEAN"),
            *("step? COMBO", "enlarge? BOOLEAN", "min_side? INT"),
        ],
        ["pictures ATELIER_PICTURE_SETTINGS"],
    ),
    "AtelierCacheLatents": (
        [
            *("dataset ATELIER_DATASET", "vae VAE", "batch_size INT", "latents? COMBO"),
            *("tile? COMBO", "limit_gb? FLOAT"),
        ],
        ["latents ATELIER_LATENT_CACHE"],
    ),
    "AtelierEncodePrompts": (
        [
            *("dataset ATELIER_DATASET", "clip CLIP", "length INT", "batch_size? INT"),
            *("limit_gb? FLOAT", "preservation_settings? ATELIER_PRESERVATION_SETTINGS"),
            "mask_padding? BOOLEAN",
        ],
        ["prompts ATELIER_PROMPT_CACHE"],
    ),
    "AtelierImportEmbeddings": (
        ["dataset ATELIER_DATASET", "file COMBO"],
        ["prompts ATELIER_PROMPT_CACHE"],
    ),
    "AtelierExportEmbeddings": (
        ["dataset ATELIER_DATASET", "prompts ATELIER_PROMPT_CACHE", "name STRING"],
        ["file STRING"],
    ),
    "AtelierTrainLoRA": (
        [
            *("model MODEL", "latents ATELIER_LATENT_CACHE", "prompts ATELIER_PROMPT_CACHE"),
            *("name STRING", "length INT", "unit COMBO", "rank INT", "targets COMBO"),
            *("learning_rate FLOAT", "batch_size INT", "gradient_accumulation INT", "seed INT"),
            *("guidance FLOAT", "compute_dtype COMBO", "gradient_checkpointing BOOLEAN"),
            *("checkpoint_every INT", "sample_every INT", "sample_steps INT", "sample_seed INT"),
            *("vae? VAE", "positive? CONDITIONING", "activations_in_ram? BOOLEAN"),
            *("validation? ATELIER_VALIDATION", "resume? COMBO", "checkpoint_unit? COMBO"),
            *("keep_checkpoints? INT", "logger? COMBO"),
            "lora_settings? ATELIER_LORA_SETTINGS",
            "optimizer_settings? ATELIER_OPTIMIZER_SETTINGS",
            "schedule_settings? ATELIER_SCHEDULE_SETTINGS",
            "preservation_settings? ATELIER_PRESERVATION_SETTINGS",
            *("speed_settings? ATELIER_SPEED_SETTINGS", "assistant? COMBO"),
        ],
        [
            *("lora LORA_MODEL", "model MODEL", "lora_name STRING", "loss LOSS_MAP"),
            "samples IMAGE",
        ],
    ),
    "AtelierValidationSettings": (
        [
            *("every INT", "unit COMBO", "at_start BOOLEAN", "at_end BOOLEAN", "prompts STRING"),
            *("library COMBO", "negative STRING", "sizes STRING", "seed INT", "steps INT"),
            *("sampler_name COMBO", "scheduler COMBO", "guidance FLOAT", "cfg FLOAT"),
            *("clip? CLIP", "vae? VAE", "held_out_latents? ATELIER_LATENT_CACHE"),
            *("held_out_prompts? ATELIER_PROMPT_CACHE", "score_vision? CLIP_VISION"),
            *("score_clip? CLIP", "mask_padding? BOOLEAN"),
        ],
        ["validation ATELIER_VALIDATION"],
    ),
    "AtelierMaskedTextEncode": (
        ["clip CLIP", "text STRING", "guidance FLOAT"],
        ["CONDITIONING CONDITIONING"],
    ),
    "AtelierApplyLoRA": (
        [
            *("model MODEL", "lora_name COMBO", "strength FLOAT", "lora? LORA_MODEL"),
            *("clip? CLIP", "strength_clip? FLOAT", "block_weights? STRING"),
            *("start_percent? FLOAT", "end_percent? FLOAT"),
        ],
        ["MODEL MODEL", "CLIP CLIP"],
    ),
    "AtelierLoRAMixer": (
        [
            *("model MODEL", "lora_1 COMBO", "weight_1 FLOAT", "lora_2 COMBO", "weight_2 FLOAT"),
            *("lora_3 COMBO", "weight_3 FLOAT", "lora_4 COMBO", "weight_4 FLOAT"),
            *("lora_5 COMBO", "weight_5 FLOAT", "scale FLOAT", "clip? CLIP"),
        ],
        ["MODEL MODEL", "CLIP CLIP"],
    ),
    "AtelierFuseLoRA": (
        ["model MODEL", "scale FLOAT", "format COMBO", "quantize_on? COMBO"],
        ["MODEL MODEL"],
    ),
    "AtelierSaveFusedModel": (
        ["model MODEL", "filename_prefix STRING", "dtype COMBO"],
        ["file STRING"],
    ),
    "AtelierPushToHub": (
        [
            *("lora_name COMBO", "repo_id STRING", "private BOOLEAN", "dry_run BOOLEAN"),
            *("message STRING", "lora_file? STRING", "images? IMAGE", "prompts? STRING"),
            *("trigger_words? STRING", "base_model? STRING", "description? STRING"),
        ],
        ["url STRING", "card STRING"],
    ),
    "AtelierPreservationSettings": (
        [
            *("unmasked_weight FLOAT", "normalize_masks BOOLEAN", "prior_weight FLOAT"),
            *("trigger STRING", "class_word STRING", "class_weight FLOAT"),
        ],
        ["preservation_settings ATELIER_PRESERVATION_SETTINGS"],
    ),
    "AtelierScoreLoRA": (
        [
            *("lora_name COMBO", "strength FLOAT", "guidance FLOAT", "model? MODEL"),
            *("lora? LORA_MODEL", "latents? ATELIER_LATENT_CACHE"),
            *("prompts? ATELIER_PROMPT_CACHE", "images? IMAGE", "texts? STRING", "clip? CLIP"),
            *("clip_vision? CLIP_VISION", "dataset? ATELIER_DATASET"),
        ],
        ["report STRING", "values STRING"],
    ),
    "AtelierScheduleSettings": (
        [
            *("sampling COMBO", "shift FLOAT", "auto_shift BOOLEAN", "logit_mean FLOAT"),
            *("logit_std FLOAT", "mode_scale FLOAT", "sigmoid_scale FLOAT", "beta_alpha FLOAT"),
            *("beta_beta FLOAT", "custom STRING", "loss COMBO", "huber_c FLOAT"),
            *("huber_schedule COMBO", "weight COMBO", "noise_offset FLOAT", "guidance_max FLOAT"),
            *("bypass_guidance BOOLEAN", "rollout INT", "rollout_probability FLOAT"),
            *("rollout_start FLOAT", "rollout_ramp_steps INT", "rollout_ramp COMBO"),
            *("rollout_offsets COMBO", "width INT", "height INT"),
        ],
        ["schedule ATELIER_SCHEDULE_SETTINGS", "picture IMAGE"],
    ),
    "AtelierOptimizerSettings": (
        [
            *("optimizer COMBO", "weight_decay FLOAT", "schedule COMBO", "warmup_steps INT"),
            *("cycles INT", "power FLOAT", "min_factor FLOAT", "lora_plus_ratio FLOAT"),
            *("clipping COMBO", "clip_limit FLOAT", "ema_decay FLOAT"),
        ],
        ["optimizer_settings ATELIER_OPTIMIZER_SETTINGS"],
    ),
    "AtelierDynamicThresholdCFG": (
        [
            *("model MODEL", "mimic_scale FLOAT", "threshold_percentile FLOAT"),
            *("mimic_mode COMBO", "mimic_scale_min FLOAT", "cfg_mode COMBO"),
            *("cfg_scale_min FLOAT", "sched_val FLOAT", "separate_feature_channels COMBO"),
            *("scaling_startpoint COMBO", "variability_measure COMBO", "interpolate_phi FLOAT"),
            *("basis COMBO", "start_percent FLOAT", "end_percent FLOAT"),
        ],
        ["MODEL MODEL"],
    ),
    "AtelierAdaptiveGuider": (
        [
            *("model MODEL", "positive CONDITIONING", "negative CONDITIONING", "cfg FLOAT"),
            *("threshold FLOAT", "start_percent FLOAT", "end_percent? FLOAT"),
        ],
        ["GUIDER GUIDER"],
    ),
    "AtelierCompareGrid": (
        [
            *("model MODEL", "clip CLIP", "vae VAE", "prompts STRING", "negative STRING"),
            *("loras STRING", "run COMBO", "strengths STRING", "guidances STRING", "cfgs STRING"),
            *("seed INT", "steps INT", "sampler_name COMBO", "scheduler COMBO", "width INT"),
            *("height INT", "name STRING", "checkpoints? STRING", "trained? STRING"),
        ],
        ["grid IMAGE", "table STRING"],
    ),
    "AtelierEstimateMemory": (
        [
            *("model COMBO", "format COMBO", "width INT", "height INT", "prompt_length INT"),
            *("batch_size INT", "gradient_accumulation INT", "rank INT", "targets COMBO"),
            *("compute_dtype COMBO", "gradient_checkpointing BOOLEAN"),
            *("activations_in_ram BOOLEAN", "hub_id? STRING"),
            "lora_settings? ATELIER_LORA_SETTINGS",
            "optimizer_settings? ATELIER_OPTIMIZER_SETTINGS",
            *("speed_settings? ATELIER_SPEED_SETTINGS", "references? BOOLEAN"),
        ],
        ["report STRING", "reserve_gb FLOAT"],
    ),
    "AtelierExportLoRA": (
        [
            *("lora_name COMBO", "format COMBO", "dtype COMBO", "rank INT", "name STRING"),
            *("lora? LORA_MODEL", "trigger_words? STRING"),
        ],
        ["lora_name STRING", "lora LORA_MODEL"],
    ),
    "AtelierMergeLoRAs": (
        [
            *(slot for n in range(1, 5) for slot in (f"lora_{n} COMBO", f"weight_{n} FLOAT")),
            "rank INT",
        ],
        ["lora LORA_MODEL"],
    ),
    "AtelierExtractLoRA": (
        ["model MODEL", "model_base MODEL", "rank INT", "energy FLOAT"],
        ["lora LORA_MODEL"],
    ),
    "AtelierPlotLoss": (
        [
            *("loss LOSS_MAP", "smoothing FLOAT", "log_scale BOOLEAN", "width INT"),
            *("height INT", "title? STRING"),
        ],
        ["image IMAGE"],
    ),
    "AtelierSplitDataset": (
        ["dataset ATELIER_DATASET", "amount INT", "unit COMBO"],
        ["training ATELIER_DATASET", "held_out ATELIER_DATASET"],
    ),
    "AtelierSpeedSettings": (
        [
            *("tread_ratio FLOAT", "tread_start INT", "tread_end INT", "more_routes STRING"),
            *("checkpointing COMBO", "checkpointing_interval INT", "compile BOOLEAN"),
            "products COMBO",
        ],
        ["speed ATELIER_SPEED_SETTINGS"],
    ),
    "AtelierLoRASettings": (
        [
            *("kind COMBO", "rank INT", "alpha FLOAT", "targets COMBO", "blocks STRING"),
            *("patterns STRING", "rank_patterns STRING", "dropout FLOAT", "rslora BOOLEAN"),
            *("init COMBO", "dora BOOLEAN", "lokr_factor INT", "full_matrix BOOLEAN"),
            "start_from COMBO",
        ],
        ["lora_settings ATELIER_LORA_SETTINGS"],
    ),
    "AtelierAttentionBackend": (["model MODEL", "backend COMBO"], ["MODEL MODEL"]),
}
"""Node id to its inputs and outputs in order, as `name TYPE`; `?` marks an optional input."""


def schemas() -> dict:
    import atelier

    async def nodes() -> list:
        return await (await atelier.comfy_entrypoint()).get_node_list()

    return {node.GET_SCHEMA().node_id: node for node in asyncio.run(nodes())}


NODES = schemas()
RECIPE = {**vars(JobSettings()), **vars(LoraSettings()), **vars(TrainSettings())}
SETTINGS = {
    "AtelierTrainLoRA": {**RECIPE, "length": Length().amount, "unit": Length().unit},
    "AtelierEstimateMemory": {**RECIPE, "prompt_length": PROMPT_LENGTH},
    "AtelierEncodePrompts": {"length": PROMPT_LENGTH},
    "AtelierPreservationSettings": vars(PreservationSettings()),
    "AtelierInspectDataset": {**RECIPE, "length": PROMPT_LENGTH},
    "AtelierSpeedSettings": vars(SpeedSettings()),
    "AtelierOptimizerSettings": vars(OptimizerSettings()),
}


def test_nodes_are_only_added() -> None:
    assert NODES.keys() == FROZEN.keys()


@pytest.mark.parametrize("node_id", FROZEN)
def test_inputs_are_what_saved_graphs_hold(node_id: str) -> None:
    inputs = NODES[node_id].GET_SCHEMA().inputs
    found = [f"{one.id}{'?' * one.optional} {one.get_io_type()}" for one in inputs]
    assert found == FROZEN[node_id][0]


@pytest.mark.parametrize("node_id", FROZEN)
def test_outputs_are_what_saved_graphs_hold(node_id: str) -> None:
    outputs = NODES[node_id].GET_SCHEMA().outputs
    found = [f"{one.display_name or one.get_io_type()} {one.get_io_type()}" for one in outputs]
    assert found == FROZEN[node_id][1]


@pytest.mark.parametrize("node_id", FROZEN)
def test_execute_takes_what_the_schema_declares(node_id: str) -> None:
    """Optional inputs have a default; a `**settings` takes the inputs that are not named."""
    inputs = NODES[node_id].GET_SCHEMA().inputs
    parameters = inspect.signature(NODES[node_id].execute).parameters
    rest = [p for p in parameters.values() if p.kind is p.VAR_KEYWORD]
    named = parameters.keys() - {p.name for p in rest}
    declared = {one.id for one in inputs}
    assert named <= declared
    assert rest or named == declared
    optional = {one.id for one in inputs if one.optional} & named
    assert all(parameters[name].default is not inspect.Parameter.empty for name in optional)


@pytest.mark.parametrize("node_id", SETTINGS)
def test_defaults_are_those_of_the_settings(node_id: str) -> None:
    expected = SETTINGS[node_id]
    inputs = [one for one in NODES[node_id].GET_SCHEMA().inputs if one.id in expected]
    assert inputs
    assert all(one.default == expected[one.id] for one in inputs)


@pytest.mark.parametrize("node_id", FROZEN)
def test_every_input_and_output_has_a_tooltip(node_id: str) -> None:
    schema = NODES[node_id].GET_SCHEMA()
    assert schema.description
    assert not [one.id for one in schema.inputs if not one.tooltip]
    assert not [one.display_name for one in schema.outputs if not one.tooltip]
