"""The ComfyUI side: every node of the pack, listed once."""

from comfy_api.latest import ComfyExtension, io

from .adaptive_guider import AdaptiveGuider
from .attention import AttentionBackend
from .caches import CacheLatents, EncodePrompts
from .dataset import CombineDatasets, ImageFolderDataset, ScheduleDataset, SplitDataset
from .embeddings import ExportEmbeddings, ImportEmbeddings
from .fuse import FuseLora, SaveFusedModel
from .grid import CompareGrid
from .guidance import DynamicThresholdCfg
from .images import ImagesToDataset
from .importers import HubDataset, ImportDataset
from .inspect import InspectDataset
from .loaders import LoadQuantizedFlux, LoadQuantizedTextEncoders
from .lora import ApplyLora, LoraMixer
from .lora_extract import ExtractLora
from .lora_files import ExportLora, MergeLoras
from .lora_settings import LoraSettingsNode
from .masked_text import MaskedTextEncode
from .memory import EstimateMemory
from .optimizer_settings import OptimizerSettingsNode
from .plot import PlotLoss
from .preservation_settings import PreservationSettingsNode
from .push import PushToHub
from .routes import add_routes
from .run_routes import add_run_routes
from .schedule_settings import ScheduleSettings
from .score_lora import ScoreLora
from .settings import CaptionSettingsNode, PictureSettingsNode
from .speed_settings import SpeedSettingsNode
from .train import TrainLora
from .validation_settings import ValidationSettings

NODES: list[type[io.ComfyNode]] = [
    LoadQuantizedFlux,
    LoadQuantizedTextEncoders,
    ImageFolderDataset,
    CacheLatents,
    EncodePrompts,
    TrainLora,
    ApplyLora,
    EstimateMemory,
    CaptionSettingsNode,
    PictureSettingsNode,
    ScheduleDataset,
    CombineDatasets,
    ImagesToDataset,
    InspectDataset,
    ImportEmbeddings,
    ExportEmbeddings,
    ImportDataset,
    HubDataset,
    ValidationSettings,
    PlotLoss,
    SplitDataset,
    DynamicThresholdCfg,
    ExportLora,
    MergeLoras,
    ExtractLora,
    LoraMixer,
    FuseLora,
    SaveFusedModel,
    AdaptiveGuider,
    CompareGrid,
    PushToHub,
    ScoreLora,
    SpeedSettingsNode,
    PreservationSettingsNode,
    ScheduleSettings,
    OptimizerSettingsNode,
    LoraSettingsNode,
    AttentionBackend,
    MaskedTextEncode,
]


class AtelierExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        add_routes()  # not in on_load: 0.3.75 does not call it
        add_run_routes()
        return NODES
