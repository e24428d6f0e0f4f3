"""The simulated engine in the engines' own words: `/generate`, and what vLLM and SGLang say about themselves.

Owns metric names, load documents and server info of the three flavours (`vllm`, `sglang`, `generic`). Numbers come
from the model; nothing is invented but names and versions.
"""

from __future__ import annotations

from typing import Any

from smg.lab.face import BadRequest, Job, Send, event, output_length, prompt_bytes
from smg.lab.openai_face import DONE
from smg.lab.simulated import Generation, Simulated

FLAVOURS = ("vllm", "sglang", "generic")
VERSION = "0.0.0+simulated"


class Generate:
    """SGLang's `/generate`: text or token ids in, text so far out."""

    id_prefix = ""

    def __init__(self, output_tokens: int) -> None:
        self._output_tokens = output_tokens

    def job(self, document: dict[str, Any], model: str) -> Job:
        """What the body asks for: `text` or `input_ids`, lengths in `sampling_params`."""
        prompt = document.get("text") or document.get("input_ids")
        if not prompt:
            raise BadRequest("text or input_ids is required")
        sampling = document.get("sampling_params") or {}
        if not isinstance(sampling, dict):
            raise BadRequest("sampling_params must be an object")
        output_tokens, is_cut = output_length(sampling, ("max_new_tokens",), self._output_tokens)
        return Job(
            model=model,
            prompt=prompt_bytes(prompt),
            output_tokens=output_tokens,
            is_cut=is_cut,
            is_stream=document.get("stream") is True,
            document=document,
        )

    def answer(self, job: Job, done: Generation) -> Any:
        """Text and `meta_info`; a list of them for a list of texts."""
        one = self._state(job, done, done.produced)
        texts = job.document.get("text")
        return [one] * len(texts) if isinstance(texts, list) else one

    async def stream(self, job: Job, generation: Generation, send: Send) -> None:
        """Events with the text so far, as SGLang sends them, then `[DONE]`."""
        sent = 0
        while (seen := await generation.wait_more(sent)) > sent:
            for number in range(sent, seen):
                await send(event(self._state(job, generation, number + 1)))
            sent = seen
        await send(DONE)

    def _state(self, job: Job, generation: Generation, produced: int) -> dict[str, Any]:
        is_over = generation.is_finished and produced == generation.produced
        reason = {"type": "length", "length": produced} if job.is_cut else {"type": "stop", "matched": 0}
        return {
            "text": job.text(0, produced),
            "meta_info": {
                "id": job.id,
                "finish_reason": reason if is_over else None,
                "prompt_tokens": generation.prompt_tokens,
                "completion_tokens": produced,
                "cached_tokens": generation.cached_tokens,
            },
        }


def loads(engine: Simulated, now_text: str) -> dict[str, Any]:
    """`/v1/loads`."""
    model, settings = engine.model, engine.settings
    capacity = settings.cache_blocks * settings.block_tokens
    rank = {
        "dp_rank": 0,
        "num_running_reqs": model.running,
        "num_waiting_reqs": model.waiting,
        "num_waiting_uncached_tokens": model.waiting_uncached_tokens,
        "num_total_reqs": model.running + model.waiting,
        "num_used_tokens": min(capacity, model.used_blocks * settings.block_tokens),
        "max_total_num_tokens": capacity,
        "token_usage": round(model.kv_usage_ratio, 6),
        "gen_throughput": round(engine.throughput_tps(), 3),
        "cache_hit_rate": round(_hit_rate(engine), 6),
        "utilization": round(model.running / settings.slots, 6),
        "max_running_requests": settings.slots,
    }
    return {"timestamp": now_text, "version": VERSION, "dp_rank_count": 1, "loads": [rank]}


def get_load(engine: Simulated) -> list[dict[str, Any]]:
    """SGLang's older `/get_load`."""
    model, settings = engine.model, engine.settings
    return [
        {
            "dp_rank": 0,
            "num_reqs": model.running + model.waiting,
            "num_waiting_reqs": model.waiting,
            "num_tokens": model.used_blocks * settings.block_tokens,
        }
    ]


def server_info(engine: Simulated, model_name: str) -> dict[str, Any]:
    """SGLang's `/server_info`."""
    settings = engine.settings
    return {
        "model_path": model_name,
        "served_model_name": model_name,
        "tp_size": 1,
        "dp_size": 1,
        "version": VERSION,
        "max_running_requests": settings.slots,
        "max_total_num_tokens": settings.cache_blocks * settings.block_tokens,
        "page_size": settings.block_tokens,
    }


def model_info(model_name: str) -> dict[str, Any]:
    """SGLang's `/get_model_info`."""
    return {"model_path": model_name, "tokenizer_path": model_name, "is_generation": True}


def metrics(engine: Simulated, flavour: str, model_name: str) -> str:
    """`/metrics` in the flavour's names."""
    model, settings = engine.model, engine.settings
    rows: list[tuple[str, str, float]]
    if flavour == "sglang":
        prefix, labels = "sglang:", f'model_name="{_escaped(model_name)}",dp_rank="0",tp_rank="0",pp_rank="0"'
        rows = [
            ("num_running_reqs", "gauge", model.running),
            ("num_queue_reqs", "gauge", model.waiting),
            ("num_used_tokens", "gauge", model.used_blocks * settings.block_tokens),
            ("max_total_num_tokens", "gauge", settings.cache_blocks * settings.block_tokens),
            ("token_usage", "gauge", model.kv_usage_ratio),
            ("gen_throughput", "gauge", engine.throughput_tps()),
            ("cache_hit_rate", "gauge", _hit_rate(engine)),
            ("prompt_tokens_total", "counter", model.prompt_tokens_total),
            ("generation_tokens_total", "counter", model.output_tokens_total),
            ("num_requests_total", "counter", model.finished_total),
        ]
    else:
        prefix, labels = "vllm:", f'engine="0",model_name="{_escaped(model_name)}"'
        rows = [
            ("num_requests_running", "gauge", model.running),
            ("num_requests_waiting", "gauge", model.waiting),
            ("kv_cache_usage_perc", "gauge", model.kv_usage_ratio),
            ("prefix_cache_queries_total", "counter", model.prompt_tokens_total),
            ("prefix_cache_hits_total", "counter", model.cached_tokens_total),
            ("prompt_tokens_total", "counter", model.prompt_tokens_total),
            ("generation_tokens_total", "counter", model.output_tokens_total),
            ("request_success_total", "counter", model.finished_total),
        ]
    lines = []
    for name, kind, value in rows:
        family = prefix + name
        lines.append(f"# HELP {family} Of a simulated engine.\n# TYPE {family} {kind}\n")
        lines.append(f"{prefix}{name}{{{labels}}} {float(value)!r}\n")
    if flavour != "sglang":
        sizes = f'block_size="{settings.block_tokens}",num_gpu_blocks="{settings.cache_blocks}"'
        lines.append(
            "# HELP vllm:cache_config_info Of a simulated engine.\n# TYPE vllm:cache_config_info gauge\n"
        )
        lines.append(f'vllm:cache_config_info{{{sizes},cache_dtype="auto",engine="0"}} 1.0\n')
    return "".join(lines)


def _hit_rate(engine: Simulated) -> float:
    model = engine.model
    return model.cached_tokens_total / model.prompt_tokens_total if model.prompt_tokens_total else 0.0


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
