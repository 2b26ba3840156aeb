"""SteadyVSR: FlashVSR video super-resolution as a ComfyUI node pack and as a Python package.

The folder of this file is both the pack folder (`custom_nodes/steadyvsr`) and the package `steadyvsr`. Nothing of
ComfyUI is imported until ComfyUI itself asks for the nodes.
"""

import logging

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The V3 extension of this pack; ComfyUI's loader calls it once at start-up.

    Raises: whatever importing the nodes raises, after logging it. The loader reports an error raised here in one line
    without a traceback, which hides the file at fault.
    """
    try:
        from .nodes import FlashVSRExtension

        return FlashVSRExtension()
    except Exception as error:
        logging.getLogger("steadyvsr").error("SteadyVSR: the nodes could not be imported.", exc_info=error)
        raise
