"""Schemas of nodes in the form of 0.3.64: what later versions added is refused, as it is there."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import Any, ClassVar


class Hidden(str, Enum):
    unique_id = "UNIQUE_ID"


@dataclass
class Input:
    """Any input of a node."""

    io_type: ClassVar[str] = ""
    id: str
    display_name: str | None = None
    optional: bool = False
    tooltip: str | None = None
    lazy: bool | None = None

    def get_io_type(self) -> str:
        return self.io_type


@dataclass
class Widget(Input):
    """An input that is set on the node."""

    default: Any = None


@dataclass
class Output:
    io_type: ClassVar[str] = ""
    id: str
    display_name: str | None = None
    tooltip: str | None = None
    is_output_list: bool = False

    def get_io_type(self) -> str:
        return self.io_type


class Kind:
    """A type of socket: `Input` and `Output` of its own."""

    Input: type = Input
    Output: type = Output

    def __init_subclass__(cls, io_type: str) -> None:
        for name in ("Input", "Output"):
            setattr(cls, name, type(name, (getattr(cls, name),), {"io_type": io_type}))


def Custom(io_type: str) -> type[Kind]:
    class Socket(Kind, io_type=io_type):
        pass

    return Socket


Image, Latent, Model, Clip, Vae, Video, AnyType = map(
    Custom, ("IMAGE", "LATENT", "MODEL", "CLIP", "VAE", "VIDEO", "*")
)  # fmt: skip


class Boolean(Kind, io_type="BOOLEAN"):
    @dataclass
    class Input(Widget):
        pass


class Int(Kind, io_type="INT"):
    @dataclass
    class Input(Widget):
        min: int | None = None
        max: int | None = None
        step: int | None = None
        control_after_generate: bool | None = None


class Float(Kind, io_type="FLOAT"):
    @dataclass
    class Input(Widget):
        min: float | None = None
        max: float | None = None
        step: float | None = None


class String(Kind, io_type="STRING"):
    @dataclass
    class Input(Widget):
        multiline: bool = False


class Combo(Kind, io_type="COMBO"):
    @dataclass
    class Input(Widget):
        options: list[str] = field(default_factory=list)


class MultiType:
    class Input(Input):
        def __init__(
            self, id: str, types: list[type[Kind]], optional: bool = False, tooltip: str | None = None
        ) -> None:
            super().__init__(id, optional=optional, tooltip=tooltip)
            self.types = types

        def get_io_type(self) -> str:
            return ",".join(kind.Input.io_type for kind in self.types)


@dataclass
class Schema:
    node_id: str
    display_name: str | None = None
    category: str = ""
    inputs: list[Input] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    hidden: list[Hidden] = field(default_factory=list)
    description: str = ""
    is_input_list: bool = False
    is_output_node: bool = False


class NodeOutput:
    def __init__(self, *args: Any, ui: Any = None) -> None:
        self.args, self.ui = args, ui


class ComfyNode:
    hidden: Any = None

    @classmethod
    def PREPARE_CLASS_CLONE(cls, hidden_inputs: dict[Hidden, Any] | None) -> type[ComfyNode]:
        """The class that a run executes, with what is hidden from the user."""
        clone = type(cls.__name__, (cls,), {})
        clone.hidden = SimpleNamespace(unique_id=(hidden_inputs or {}).get(Hidden.unique_id))
        return clone
