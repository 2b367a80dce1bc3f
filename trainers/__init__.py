"""The trainer: plain torch, diffusers, peft and bitsandbytes. It knows nothing of ComfyUI."""
