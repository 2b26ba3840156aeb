"""Run by a real ComfyUI's Python, in its folder: the seven phases of a Wan workflow on a simulated card, with gates.

    python phases_session.py PACK_FOLDER BASE_FOLDER [SCENARIO…]

Prompts go through ComfyUI's own executor. Prints one JSON object on the last line: scenario → what was observed, or
{"error": traceback}. The assertions are in test_phases.py; benchmarks/seven_phases.py prints the table.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
import sys
import traceback

WANTED = sys.argv[3:]

import phases_workflow as workflow  # noqa: E402
from phases_host import (  # noqa: E402
    BASE,
    CARD,
    DYNAMIC_READER,
    EXECUTOR,
    FILES,
    FLASHVSR,
    GIB,
    RECORD,
    WITNESS,
    Sink,
    allocated,
    error_of,
    execute,
    execute_plain,
    gate,
    gate_models,
    largest_weight,
    live_bytes,
    mm,
    nodes,
    numbers_of,
    pack,
    resident,
    texts_of,
    tiny_taesd,
    torch,
)
from safetensors.torch import load_file  # noqa: E402


def phases() -> dict:
    """Three rounds; between two of them ComfyUI forgets everything, as its button does."""
    rounds = []
    for seed in range(3):
        EXECUTOR.forget()
        outcome = EXECUTOR.run(workflow.seven_phases(FILES, seed))
        loads, ended = RECORD.take()
        table = []
        for number, phase in enumerate(ended):
            most: dict[str, int] = {}
            for load in loads:
                if load["phase"] == number:
                    most |= {name: max(size, most.get(name, 0)) for name, size in load["resident"].items()}
            result = phase["ended"]
            (card,) = result.cards
            table.append(
                {
                    "phase": phase["name"],
                    "resident_in_phase": most,
                    "peak_bytes": card.peak.allocated.bytes,
                    "before_gate": phase["before"],
                    "after_by_books": phase["after"],
                    "after_by_probe": card.reading.allocated.bytes,
                    "receipts": [
                        {
                            "name": r.name, "verdict": r.verdict.value, "asked": r.asked, "left": r.left_tensors,
                            "still_loaded": r.still_loaded, "parameters": dict(r.parameters),
                        }
                        for r in result.receipts
                    ],
                }
            )  # fmt: skip
        del loads, ended, result, card, phase
        rounds.append(
            {"error": outcome["error"], "phases": table, "resident_at_end": resident(), "live_bytes": live_bytes()}
        )
    return {"capacity": CARD.capacity, "rounds": rounds}


def stubbed() -> dict:
    """The offload call of one phase does nothing."""
    seen = {}
    for phase in workflow.PHASES:
        EXECUTOR.forget()
        RECORD.stubbed = phase
        outcome = EXECUTOR.run(workflow.seven_phases(FILES))
        RECORD.stubbed = None
        seen[phase] = {"error": outcome["error"], "failed_node": outcome["failed_node"], "resident": resident()}
    EXECUTOR.forget()
    seen["afterwards"] = {"error": EXECUTOR.run(workflow.seven_phases(FILES))["error"], "resident": resident()}
    return seen


def reports() -> dict:
    """Every number of every report against what the probe and the books answered in that run, and in no other."""
    seen, spelled = [], pack("memory.reading").size_text
    for salt in (1_000_003, 2_000_029):
        EXECUTOR.forget()
        WITNESS.answers.clear()
        WITNESS.others = salt
        most = CARD.capacity / GIB
        outcome = EXECUTOR.run(workflow.seven_phases(FILES, budget_gb=0.0, needs_gb=0.001, peak_gb=most))
        WITNESS.others = 0
        loads, ended = RECORD.take()
        answers = {number for reading in WITNESS.answers for number in numbers_of(reading.to_json())}
        # Of the machine's RAM, which is read beside the card, reports tell what concerns them.
        of_card = [reading for reading in WITNESS.answers if reading.device == str(CARD.device)]
        books = {size for phase in ended for side in ("before", "after") for size in phase[side].values()}
        books |= {item.model.model_size() for item in mm.current_loaded_models if item.model is not None}
        limits = {int(0.001 * GIB), int(most * GIB), 0}
        read = answers | books | limits | read_by_loaders()
        parameters = {
            size for phase in ended for receipt in phase["ended"].receipts for size in receipt.parameters.values()
        }
        known = read | {first - second for first in read for second in read} | parameters
        amounts = {spelled(number).split()[0] for number in known}
        # The last press was before this run: what is told of it is what was recorded then, and nothing else.
        press = pack("patches.presses").last_press()
        recorded = set(numbers_of(json.loads(json.dumps(press and press.to_json()))))
        told = {
            number for report in outcome["reports"].values() for number in numbers_of(report.pop("last_press", None))
        }
        said = [number for report in outcome["reports"].values() for number in numbers_of(report)]
        texts = [text for report in outcome["reports"].values() for text in texts_of(report)]
        in_text = [amount for text in texts for amount in re.findall(r"(?<![\d.])\d+\.\d\d(?! s)(?= |$)", text)]
        seen.append(
            {
                "error": outcome["error"],
                "reports": sorted(outcome["reports"]),
                "numbers": len(said),
                "unexplained": sorted(set(said) - known),
                "press_as_recorded": bool(told) and told <= recorded,
                "in_text": len(in_text),
                "unexplained_in_text": sorted(set(in_text) - amounts),
                "salted": sum(number >= salt for number in said if number in answers and number - salt in read),
                "said": sorted(set(said)),
                "answers": sorted({number for reading in of_card for number in numbers_of(reading.to_json())}),
            }
        )
        del ended, loads
    return {"runs": seen}


def read_by_loaders() -> set[int]:
    """What the loaders' reports are made of, counted here: sizes of files and of what is in them, uses of an entry."""
    paths = list((BASE / "models").rglob("*.safetensors"))
    files = {path.stat().st_size for path in paths}
    files |= {sum(tensor.nbytes for tensor in load_file(path).values()) for path in paths}
    lora = load_file(BASE / "models" / "loras" / FILES["lora"])
    entries = pack("patches.kept").registry().entries()
    patchers = [patcher for entry in entries for patcher in entry.patchers]
    files |= {sum(weight.nbytes for weight in patcher.model.parameters()) for patcher in patchers}
    counts = {number for entry in entries for number in (entry.loads, entry.hits)}
    return files | counts | {sum(tensor.nbytes for tensor in lora.values()), len(lora) // 2}


def caching() -> dict:
    """The same prompt again and again: gates with nothing to do are skipped, gates with something to do are not."""
    EXECUTOR.forget()
    prompt = workflow.seven_phases(FILES)

    def run(**changes) -> dict:
        outcome = EXECUTOR.run(prompt | changes)
        _, ended = RECORD.take()
        return {"error": outcome["error"], "gates": [phase["name"] for phase in ended], "resident": resident()}

    seen = {"first": run(), "again": run()}
    patcher = next(iter(gate_models("patch")))
    mm.load_models_gpu([patcher])
    seen["dirty_before"] = resident()
    seen["dirty"], seen["after_dirty"] = run(), run()
    seed = copy.deepcopy(prompt["sample"])
    seed["inputs"]["seed"] = 99
    seen["new_seed"] = run(sample=seed)
    foreign = [tiny_taesd()]
    mm.load_models_gpu([foreign[0].patcher])
    seen["foreign_before"] = resident()
    seen["foreign"] = run()
    del patcher, foreign
    EXECUTOR.forget()
    return seen


def semantics() -> dict:
    """What goes in comes out; lists pass whole; whatever is no model is refused."""
    EXECUTOR.forget()
    single, several = object(), [object(), object(), object()]
    seen = {
        "identity": gate(single)[0][0] is single,
        "list_identity": all(a is b for a, b in zip(gate(several)[0], several, strict=True)),
        "none": gate(None)[0] == [None],
        "report_identity": execute("MemoryReport", value=single, label="x")[0][0] is single,
        "plot": list(execute("MemoryReport", value=single, label="x")[2].shape),
        "no_model": error_of(gate, 1, model_1="text"),
    }
    Sink.seen.clear()
    RECORD.take()
    outcome = EXECUTOR.run(
        {
            "lists": {"class_type": "Test_Lists", "inputs": {"count": 3}},
            "gate": workflow.gate("lists", ["lists", 0]),
            "report": {"class_type": "SteadyVSR_MemoryReport", "inputs": {"value": ["gate", 0], "label": "x"}},
            "sink": {"class_type": "Test_Sink", "inputs": {"image": ["report", 0]}},
        }
    )
    _, ended = RECORD.take()
    # A limit that another node computes is unknown when the prompt begins.
    number = {"class_type": "PrimitiveFloat", "inputs": {"value": 0.5}}
    wired = {"lists": {"class_type": "Test_Lists", "inputs": {"count": 1}}, "number": number}
    wired["gate"] = workflow.gate("wired", ["lists", 0], budget_gb=["number", 0])
    limits = [EXECUTOR.run(wired)["reports"]["gate"]["limits_bytes"] for _ in range(2)]
    _, ended_when_wired = RECORD.take()
    leaf = {"lists": {"class_type": "Test_Lists", "inputs": {"count": 3}}, "gate": workflow.gate("leaf", ["lists", 0])}
    EXECUTOR.run(leaf)
    _, ended_as_leaf = RECORD.take()
    return seen | {
        "error": outcome["error"],
        "wired": [limits, len(ended_when_wired)],
        "leaf": [phase["name"] for phase in ended_as_leaf],
        "through_lists": [image.mean().item() for image in Sink.seen],
        "gates_for_a_list": len(ended),
    }


def limits() -> dict:
    """Budget, need and peak, on a card with a model that no gate was given; kept and pinned models move."""
    EXECUTOR.forget()
    taesd = tiny_taesd()
    mm.load_models_gpu([taesd.patcher])
    size = allocated() or 0
    seen: dict = {
        "size": size,
        "device": str(CARD.device),
        "capacity": CARD.capacity,
        "resident": resident(),
        "budget": error_of(gate, 1, budget_gb=(size - 1) / GIB, phase="small"),
        "budget_met": error_of(gate, 1, budget_gb=(size + 8) / GIB),
        "needs": error_of(gate, 1, needs_gb=CARD.capacity / GIB),
        "needs_met": error_of(gate, 1, needs_gb=(CARD.capacity - size - 8) / GIB),
        "peak": error_of(gate, 1, peak_gb=0.0, phase="peaky"),
        "warned": json.loads(gate(1, budget_gb=0.0, on_violation="warn")[1])["violations"],
        "still_there": resident(),
    }
    rests, taesd.patcher.offload_device = taesd.patcher.offload_device, CARD.device
    seen["rests_there"] = error_of(gate, 1, model_1=taesd)
    taesd.patcher.offload_device = rests
    registry = pack("patches.kept").registry()
    for policy in ("keep", "pin"):
        key = pack("patches.kept").Key("test", ())
        patchers_of = pack("patches.residency").patchers_of
        value = registry.obtain(key, policy, lambda: taesd, patchers_of, "taesd")
        mm.load_models_gpu([value.patcher])
        seen[policy] = {"before": resident(), "report": json.loads(gate(1, model_2=value, budget_gb=0.0)[1])}
        seen[policy] |= {"after": resident(), "owned": registry.owner_of(value.patcher).policy}
        registry.release()
        del value
    flashvsr = execute_plain("LoadFlashVSR", model_set="nano (embedded)", **FLASHVSR)
    capacity, CARD.capacity = CARD.capacity, 1 << 30
    mm.load_models_gpu(flashvsr.patchers())
    before = resident()
    report = json.loads(gate(1, model_1=flashvsr, model_2=taesd, budget_gb=0.0)[1])
    CARD.capacity = capacity
    seen["flashvsr"] = {"before": before, "after": resident(), "receipts": [r["name"] for r in report["offloaded"]]}
    return seen


HELD: list = []


def leaks() -> dict:
    """Storages of the card that something keeps after the move, seen by the probe and named in the receipt.

    By the books a move leaves the storages where they are, so it is completed here as on a real one: the model gets
    new ones. What then still lives is counted as allocated. A card with memory of its own does and counts that itself.
    """
    holders = pack("memory.holders")
    pack("memory.offload").offload.__kwdefaults__["seconds"] = 120.0  # a busy machine is no reason to name nobody
    seen = {}
    there: list = []
    for kind in ("nothing", "closure", "backup", "node cache"):
        EXECUTOR.forget()
        prompt = {
            "unet": workflow.seven_phases(FILES)["unet"],
            "keep": {
                "class_type": "Test_Keep" if kind == "node cache" else "Test_PutOnCard",
                "inputs": {"model": ["unet", 0]},
            },
            "gate": workflow.gate("leak", ["keep", 0], model_1=["unet", 0]),
        }  # fmt: skip

        def finish(kind: str = kind) -> None:
            (patcher,) = gate_models("unet")
            (weight,) = there
            there.clear()
            if kind == "closure":
                HELD.append(lambda: weight.sum())
            if kind == "backup":
                patcher.backup["diffusion_model.text_embedding.0.weight"] = (weight, False)
            if CARD.device.type != "cpu":
                return
            WITNESS.watched = holders.watch([*patcher.model.named_parameters(), *patcher.model.named_buffers()])
            for tensor in [*patcher.model.parameters(), *patcher.model.buffers()]:
                tensor.data = tensor.data.clone()

        RECORD.before_move = lambda: there.append(largest_weight(gate_models("unet")[0]))
        RECORD.after_move = finish
        outcome = EXECUTOR.run(prompt)
        RECORD.before_move = RECORD.after_move = lambda: None
        _, ended = RECORD.take()
        HELD.clear()
        for phase in ended:
            (receipt,) = phase["ended"].receipts
            seen[kind] = {
                "error": outcome["error"], "verdict": receipt.verdict.value, "asked": receipt.asked,
                "held": [[holder.name, holder.bytes] for holder in receipt.held], "unnamed": receipt.unnamed,
            }  # fmt: skip
            del receipt
        for patcher in gate_models("unet"):
            patcher.backup.clear()
            seen[kind]["largest"] = largest_weight(patcher).nbytes
        del ended, phase, patcher
        WITNESS.watched = []
    return seen


def dying() -> dict:
    """A probe that fails from the third reading on: marked readings, no number, no crash; and it recovers."""
    EXECUTOR.forget()
    WITNESS.dies_after = 3
    outcome = EXECUTOR.run(workflow.seven_phases(FILES))
    _, ended = RECORD.take()
    WITNESS.dies_after = None
    last = ended[-1]["ended"]
    seen = {
        "error": outcome["error"],
        "phases": len(ended),
        "verdicts": [receipt.verdict.value for phase in ended for receipt in phase["ended"].receipts],
        "after": [phase["after"] for phase in ended],
        "notes": list(last.notes),
        "allocated": last.phase.after[0].allocated.bytes,
    }
    EXECUTOR.forget()
    taesd = tiny_taesd()
    mm.load_models_gpu([taesd.patcher])
    WITNESS.dies_after = 0
    seen["budget"] = error_of(gate, 1, budget_gb=0.0)
    WITNESS.dies_after = None
    del taesd
    EXECUTOR.forget()
    return seen | {"then": EXECUTOR.run(workflow.seven_phases(FILES))["error"]}


def on_the_cpu() -> dict:
    """Without an accelerator nothing can be taken off a card, and a budget of a card is no reason to stop."""
    EXECUTOR.forget()
    names = [name for name in ("get_torch_device", "get_all_torch_devices") if hasattr(mm, name)]
    kept = {name: getattr(mm, name) for name in names}
    mm.get_torch_device = lambda: torch.device("cpu")
    mm.get_all_torch_devices = lambda *_, **__: [torch.device("cpu")]
    try:
        taesd = tiny_taesd()
        mm.load_models_gpu([taesd.patcher])
        report = json.loads(gate(1, model_1=taesd, budget_gb=0.0)[1])
    finally:
        for name, function in kept.items():
            setattr(mm, name, function)
        if "get_all_torch_devices" not in kept:
            del mm.get_all_torch_devices
    mm.free_memory(1e30, torch.device("cpu"))
    return {
        "verdicts": [item["verdict"] for item in report["offloaded"]],
        "text": report["text"],
        "cards": report["cards"],
    }


def schema() -> dict:
    seen: dict = {"dynamic_reader": DYNAMIC_READER is pack("patches.residency")._dynamic_bytes}
    for name in ("PhaseGate", "MemoryReport"):
        kind = nodes.NODE_CLASS_MAPPINGS[f"SteadyVSR_{name}"]
        declared = kind.define_schema()
        seen[name] = {
            "inputs": [item.id for item in declared.inputs],
            "parameters": list(inspect.signature(kind.execute).parameters),
            "without_tooltip": [item.id for item in [*declared.inputs, *declared.outputs] if not item.tooltip],
            "category": declared.category,
            "model_types": kind.GET_NODE_INFO_V1()["input"].get("optional", {}).get("model_1", [""])[0],
        }
    return seen


SCENARIOS = (schema, phases, stubbed, reports, caching, semantics, limits, leaks, dying, on_the_cpu)


def main() -> None:
    results: dict = {}
    for scenario in SCENARIOS:
        if WANTED and scenario.__name__ not in WANTED:
            continue
        try:
            results[scenario.__name__] = scenario()
        except BaseException:  # noqa: B036  reported, and the test of this scenario fails on it
            results[scenario.__name__] = {"error": traceback.format_exc()}
    sys.stdout.write("\n" + json.dumps(results) + "\n")


main()
