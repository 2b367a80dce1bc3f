"""What ComfyUI loads: the nodes are imported on demand, so this can be imported without ComfyUI."""

import logging

WEB_DIRECTORY = "./js"


async def comfy_entrypoint():
    try:
        from .nodes import AtelierExtension
    except Exception:
        # ComfyUI reduces an error in here to one line without a traceback.
        logging.getLogger("atelier").exception("Atelier could not be loaded.")
        raise
    return AtelierExtension()
