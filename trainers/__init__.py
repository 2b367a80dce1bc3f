"""The trainer: plain torch, diffusers and bitsandbytes. It knows nothing of ComfyUI."""
