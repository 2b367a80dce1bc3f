"""The pack's own wire types, declared once. The name in quotes is a contract: never rename it."""

from comfy_api.latest import io

AtelierDataset = io.Custom("ATELIER_DATASET")
"""`trainers.dataset.Dataset`"""

AtelierLatentCache = io.Custom("ATELIER_LATENT_CACHE")
"""`trainers.caches.LatentCache`"""

AtelierPromptCache = io.Custom("ATELIER_PROMPT_CACHE")
"""`trainers.caches.PromptCache`"""

AtelierCaptionSettings = io.Custom("ATELIER_CAPTION_SETTINGS")
"""`trainers.captions.CaptionSettings`"""

AtelierPictureSettings = io.Custom("ATELIER_PICTURE_SETTINGS")
"""`trainers.dataset.PictureSettings`"""

AtelierValidation = io.Custom("ATELIER_VALIDATION")
"""`validation.Validation`"""

AtelierLoraSettings = io.Custom("ATELIER_LORA_SETTINGS")
"""`trainers.lora_settings.LoraSettings`"""

AtelierOptimizerSettings = io.Custom("ATELIER_OPTIMIZER_SETTINGS")
"""`trainers.optimizer_settings.OptimizerSettings`"""

AtelierFlowSettings = io.Custom("ATELIER_SCHEDULE_SETTINGS")
"""`trainers.flow_settings.FlowSettings`"""

AtelierPreservationSettings = io.Custom("ATELIER_PRESERVATION_SETTINGS")
"""`trainers.preservation_settings.PreservationSettings`"""

AtelierSpeedSettings = io.Custom("ATELIER_SPEED_SETTINGS")
"""`trainers.speed_settings.SpeedSettings`"""
