"""The settings of what happens to a request: routing, retries, breaker, health, load polls and limits.

Owns these six groups for `smg.settings`, which is the room's face: read them there. Like it, this file only declares; it must
never read a file, a variable or a clock.
"""

from __future__ import annotations

from typing import Annotated

from smg.settings_endpoint import event_endpoints
from smg.settings_flag import Flag, Group, header_name, url_path


class Routing(Group, frozen=True, kw_only=True):
    """Routing: which worker gets a request."""

    policy: Annotated[
        str,
        Flag(
            metavar="POLICY",
            doc="How a worker is chosen. cache_aware counts in seconds what is cached, what waits and what a choice costs "
            "the others, so it suits nearly every fleet.",
        ),
    ] = "cache_aware"
    prefill_policy: Annotated[
        str | None,
        Flag(metavar="POLICY", shown_default="as --policy", doc="How a prefill worker is chosen (PD)."),
    ] = None
    decode_policy: Annotated[
        str | None,
        Flag(metavar="POLICY", shown_default="as --policy", doc="How a decode worker is chosen (PD)."),
    ] = None
    cache_aware_mode: Annotated[
        str,
        Flag(
            choices=("price", "threshold"),
            doc="How cache_aware decides: by the lowest expected seconds, or by the rule of the existing system.",
        ),
    ] = "price"
    cache_price: Annotated[
        float,
        Flag(
            unit="times",
            at_least=0,
            at_most=100,
            doc="What a second of prefill costs the requests behind it, before load raises it: 1 answers soonest on idle "
            "fleets, 8 keeps the most in the caches.",
        ),
    ] = 2.0
    cache_threshold: Annotated[
        float,
        Flag(
            unit="share",
            aliases=("cache-match-threshold",),
            at_least=0,
            at_most=1,
            doc="Share of a prompt that must be cached for the cache to decide. Read in threshold mode.",
        ),
    ] = 0.3
    overload_token_usage_threshold: Annotated[
        float,
        Flag(
            unit="share",
            at_least=0,
            at_most=1,
            doc="While any worker's KV usage is above this, the least loaded one is chosen; 1 is off. Read in threshold mode.",
        ),
    ] = 1.0
    balance_token_usage_threshold: Annotated[
        float,
        Flag(
            unit="share",
            at_least=0,
            at_most=1,
            doc="Load counts as unbalanced when KV usages differ by more than this; 1 is off. Read in threshold mode.",
        ),
    ] = 1.0
    max_tree_size: Annotated[
        int,
        Flag(
            unit="bytes",
            at_least=1 << 20,
            doc="Memory of the prefix index; the fullest worker's oldest blocks give way. 64 MiB hold about half a million "
            "blocks of 512 characters.",
        ),
    ] = 67108864
    eviction_interval_secs: Annotated[
        float,
        Flag(
            unit="seconds",
            aliases=("eviction-interval",),
            above=0,
            doc="Pause between two cleanings of the prefix index: what departed workers held, and what --cache-ttl-secs ends. "
            "The bounds themselves hold at every moment.",
        ),
    ] = 60.0
    cache_ttl_secs: Annotated[
        float,
        Flag(
            unit="seconds",
            at_least=0,
            doc="A prefix that was not used for this time, at most for twice of it, is not believed to be cached any more; 0 "
            "is off. The learned size of each worker's cache bounds the index anyway.",
        ),
    ] = 0.0
    block_size: Annotated[
        int,
        Flag(
            unit="tokens",
            at_least=1,
            at_most=4096,
            doc="Tokens of a KV block of the engines. Blocks of the index end where theirs do: 128 tokens (512 bytes of text), "
            "rounded up to whole blocks of the engine. Equal on all nodes of a mesh.",
        ),
    ] = 16
    kv_events: Annotated[
        str | None,
        Flag(
            form=event_endpoints,
            metavar="ENDPOINT",
            doc="Where the engines publish their KV events (vLLM, SGLang, TensorRT-LLM), such as tcp://{host}:5557 or "
            "tcp://{host}:{port+1000}; after a comma where they replay them. A worker's label kv_events goes before. Needs "
            "pyzmq.",
        ),
    ] = None
    record_trace: Annotated[
        str | None,
        Flag(
            metavar="FILE",
            doc="Append a line for each answered request to this file, for smg simulate: time, lengths, keyed hashes of the "
            "prompt's blocks; never text.",
        ),
    ] = None
    balance_abs_threshold: Annotated[
        int,
        Flag(
            unit="requests or characters",
            aliases=("spill-abs-threshold",),
            at_least=0,
            doc="Load counts as unbalanced when most and least burdened worker are further apart than this, and by the ratio "
            "below. Read by bucket (in characters) and by cache_aware in threshold mode (in requests).",
        ),
    ] = 64
    balance_rel_threshold: Annotated[
        float,
        Flag(
            unit="times",
            aliases=("spill-rel-threshold",),
            at_least=1,
            doc="Load counts as unbalanced when the most burdened worker has more than this many times the load of the least "
            "burdened, and by the difference above.",
        ),
    ] = 1.5
    assignment_mode: Annotated[
        str,
        Flag(
            choices=("random", "min_load", "min_group"),
            doc="Where manual puts a new routing key: anywhere, at the least loaded worker, or at the one with fewest keys.",
        ),
    ] = "random"
    max_idle_secs: Annotated[
        float,
        Flag(
            unit="seconds",
            aliases=("sticky-key-idle-secs",),
            above=0,
            doc="manual forgets a routing key that was not used for this time. Four hours outlive a working session's pauses.",
        ),
    ] = 14_400.0
    prefix_token_count: Annotated[
        int,
        Flag(
            unit="tokens",
            above=0,
            doc="prefix_hash hashes this many tokens (four characters each) from the start of a prompt: a usual system prompt.",
        ),
    ] = 256
    prefix_hash_load_factor: Annotated[
        float,
        Flag(
            unit="times",
            at_least=1,
            doc="prefix_hash skips a worker with more than this many times the mean load. 1.25 bounds the imbalance while few "
            "keys move (consistent hashing with bounded loads, Mirrokni et al. 2018).",
        ),
    ] = 1.25
    least_load_kv_pressure_weight: Annotated[
        float,
        Flag(
            unit="seconds",
            at_least=0,
            doc="Weight of a filling KV cache in least_load: w k/(1-k) is added to the wait.",
        ),
    ] = 0.15
    least_load_default_throughput: Annotated[
        float,
        Flag(
            unit="tokens per second",
            above=0,
            doc="Throughput least_load assumes for a worker that reports none.",
        ),
    ] = 2000.0
    least_load_mean_prefill_tokens: Annotated[
        float,
        Flag(
            unit="tokens",
            above=0,
            doc="Prompt length least_load assumes for a queued request of unknown length.",
        ),
    ] = 1024.0
    routing_key_override: Annotated[
        bool,
        Flag(
            aliases=("sticky-sessions",),
            doc="Every policy obeys a routing key, not only those made for it (RT-5).",
        ),
    ] = False
    routing_key_headers: Annotated[
        tuple[str, ...],
        Flag(
            form=header_name,
            metavar="HEADER",
            doc="More headers that may carry a routing key, first valid one wins (RT-5).",
        ),
    ] = ()
    worker_overload_waiting_requests: Annotated[
        int,
        Flag(
            unit="requests",
            above=0,
            doc="A worker whose engine reports this many waiting requests or more is overloaded: two or three seconds of wait.",
        ),
    ] = 8
    worker_overload_token_usage: Annotated[
        float,
        Flag(
            unit="parts of 1",
            above=0,
            at_most=1,
            doc="A worker whose KV cache is filled to this share or more is overloaded: engines begin to preempt soon after.",
        ),
    ] = 0.8
    worker_overload_protection: Annotated[
        bool | None,
        Flag(
            off_flag="disable-worker-overload-protection",
            shown_default="off with cache_aware, which weighs waiting itself; else on",
            doc="Overloaded workers get no request while another candidate exists (RT-1).",
        ),
    ] = None
    worker_overload_shed: Annotated[
        bool,
        Flag(
            doc="When all candidates are overloaded, refuse with 503 (ERR-19). Off: they get it all the same."
        ),
    ] = False
    bucket_adjust_interval_secs: Annotated[
        float,
        Flag(
            unit="seconds",
            above=0,
            doc="How often bucket moves the bounds between its ranges of prompt length.",
        ),
    ] = 5.0

    def protects_from_overload(self) -> bool:
        """Whether overloaded workers are left out (RT-1): as told, else by the policy."""
        if self.worker_overload_protection is not None:
            return self.worker_overload_protection
        return self.policy != "cache_aware" or self.cache_aware_mode == "threshold"


class Retries(Group, frozen=True, kw_only=True):
    """Retries and timeouts: how often and how long one request is tried."""

    retry_max_retries: Annotated[
        int,
        Flag(
            unit="sends",
            above=0,
            doc="At most this many sends of one request, the first counted too (RTY-2).",
        ),
    ] = 5
    retry_initial_backoff_ms: Annotated[
        float,
        Flag(unit="milliseconds", above=0, doc="Pause before the first repeat on the same worker (RTY-3)."),
    ] = 50.0
    retry_max_backoff_ms: Annotated[
        float,
        Flag(unit="milliseconds", above=0, doc="Longest pause before a repeat on the same worker (RTY-3)."),
    ] = 30_000.0
    retry_backoff_multiplier: Annotated[
        float,
        Flag(unit="times", at_least=1, doc="Each pause is this many times the one before (RTY-3)."),
    ] = 1.5
    retry_jitter_factor: Annotated[
        float,
        Flag(
            unit="parts of 1",
            at_least=0,
            at_most=1,
            doc="Each pause is drawn from 1 - j to 1 + j times its length, so that clients do not return in step (RTY-3).",
        ),
    ] = 0.2
    disable_retries: Annotated[
        bool, Flag(doc="One send per request (RTY-2). Checks of the request stay.")
    ] = False
    retry_budget_ratio: Annotated[
        float,
        Flag(
            unit="parts of 1",
            at_least=0,
            doc="Over 10 s, retries stay below this share of the requests, so that retries never multiply an outage (RTY-4).",
        ),
    ] = 0.2
    retry_budget_min_per_sec: Annotated[
        float,
        Flag(
            unit="retries per second",
            at_least=0,
            doc="Retries that the budget always allows, for quiet gateways (RTY-4).",
        ),
    ] = 10.0
    request_timeout_secs: Annotated[
        float,
        Flag(
            unit="seconds",
            above=0,
            doc="Bound of a request with all its retries, and of each silence inside a stream (RTY-5, STR-11).",
        ),
    ] = 1800.0
    connect_timeout_secs: Annotated[
        float,
        Flag(unit="seconds", above=0, doc="A connection to a worker must be up within this time."),
    ] = 10.0


class Breaker(Group, frozen=True, kw_only=True):
    """Circuit breaker: when a failing worker is left alone."""

    cb_failure_threshold: Annotated[
        int,
        Flag(unit="failures", above=0, doc="Failures in a row that open the breaker of a worker (CB-1)."),
    ] = 10
    cb_success_threshold: Annotated[
        int,
        Flag(
            unit="successes",
            above=0,
            doc="Successes that close a half-open breaker, and requests it lets through (CB-3).",
        ),
    ] = 3
    cb_timeout_duration_secs: Annotated[
        float,
        Flag(unit="seconds", above=0, doc="An open breaker turns half open after this time (CB-3)."),
    ] = 60.0
    cb_window_duration_secs: Annotated[
        float,
        Flag(unit="seconds", above=0, doc="Failures older than this do not count (CB-2)."),
    ] = 120.0
    disable_circuit_breaker: Annotated[bool, Flag(doc="The breaker never opens (CB-5).")] = False


class Health(Group, frozen=True, kw_only=True):
    """Health checks: probes of the workers."""

    health_check_endpoint: Annotated[
        str,
        Flag(form=url_path, metavar="PATH", doc="Path of the probe (HLT-1)."),
    ] = "/health"
    health_check_interval_secs: Annotated[
        float,
        Flag(
            unit="seconds",
            above=0,
            doc="Pause between probes of one worker. A minute is enough, since failing requests start a probe at once (HLT-2).",
        ),
    ] = 60.0
    health_check_timeout_secs: Annotated[
        float,
        Flag(unit="seconds", above=0, doc="A probe without an answer in this time is a miss."),
    ] = 5.0
    health_failure_threshold: Annotated[
        int,
        Flag(unit="misses", above=0, doc="Misses in a row that make a worker not ready (HLT-1)."),
    ] = 3
    health_success_threshold: Annotated[
        int,
        Flag(unit="hits", above=0, doc="Hits in a row that make it ready again (HLT-1)."),
    ] = 2
    disable_health_check: Annotated[
        bool,
        Flag(doc="Workers are ready at once and never probed; only the breaker judges (HLT-3)."),
    ] = False
    remove_unhealthy_workers: Annotated[
        bool | None,
        Flag(
            off_flag="no-remove-unhealthy-workers",
            shown_default="on with discovery, else off",
            doc="A failed worker leaves the list (HLT-4).",
        ),
    ] = None


class LoadPolls(Group, frozen=True, kw_only=True):
    """Load polls: how engines are asked for their load."""

    load_monitor_interval: Annotated[
        float | None,
        Flag(
            unit="seconds",
            above=0,
            shown_default="0.25 for cache_aware, least_load and power_of_two, else 10",
            doc="Pause between polls of a worker's load. Policies that weigh load need it fresh; the others only show it.",
        ),
    ] = None
    disable_load_monitoring: Annotated[
        bool, Flag(doc="Engines are never asked; the gateway's own counts remain.")
    ] = False

    def interval_secs(self, policy: str) -> float:
        """Seconds between two polls of a worker under the policy."""
        if self.load_monitor_interval is not None:
            return self.load_monitor_interval
        return 0.25 if policy in ("cache_aware", "least_load", "power_of_two") else 10.0


class Limits(Group, frozen=True, kw_only=True):
    """Limits: how much may be in flight, and how fast it may come."""

    max_concurrent_requests: Annotated[
        int,
        Flag(
            unit="requests",
            at_least=-1,
            doc="Inference requests in flight at most (ADM-1). -1: max(4096, 1024 x cores), far above what workers can use, "
            "a guard of memory only. 0: no limit.",
        ),
    ] = -1
    queue_size: Annotated[
        int,
        Flag(
            unit="requests", at_least=0, doc="Requests that may wait for a place; 0 refuses at once (ADM-2)."
        ),
    ] = 100
    queue_timeout_secs: Annotated[
        float,
        Flag(unit="seconds", at_least=0, doc="Longest wait for a place (ADM-2). 0 only without a queue."),
    ] = 60.0
    rate_limit_tokens_per_second: Annotated[
        float | None,
        Flag(
            unit="requests per second",
            at_least=0,
            doc="Requests that may start per second, on all nodes of a mesh together (ADM-3). 0: no limit.",
        ),
    ] = None
    tenant_rate_limit_enabled: Annotated[
        bool, Flag(doc="Tenants may use what --tenant-rate-limit-config gives them, and no more (ADM-4).")
    ] = False
    tenant_rate_limit_config: Annotated[
        str | None,
        Flag(
            metavar="FILE",
            doc="Requests and tokens per minute of each tenant, and of models of theirs (YAML). Read again when it changes.",
        ),
    ] = None
    priority_scheduler_enabled: Annotated[
        bool,
        Flag(
            doc="Requests have classes (X-SMG-Priority) and wait in order of class, and of a class in turn of tenants, when the "
            "workers are full or busy with prefill (ADM-6). It takes the place of --queue-size and --queue-timeout-secs."
        ),
    ] = False
    priority_scheduler_config: Annotated[
        str | None,
        Flag(
            metavar="FILE",
            shown_default="built-in classes, all tenants alike",
            doc="The classes' reservations, queues and bounds, and the tenants' highest classes and weights (YAML). Read again "
            "when it changes.",
        ),
    ] = None
    priority_scheduler_default_max_class: Annotated[
        str,
        Flag(
            choices=("bulk", "default", "interactive", "system"),
            doc="The highest class of tenants for whom the file says nothing: whoever may name a class would name the highest.",
        ),
    ] = "default"

    def in_flight_max(self, cores: int) -> int | None:
        """Most inference requests in flight on a machine with so many cores; None means no limit."""
        if self.max_concurrent_requests < 0:
            return max(4096, 1024 * cores)
        return self.max_concurrent_requests or None

    def requests_per_second(self) -> float | None:
        """Rate limit in requests per second; None means no limit."""
        return self.rate_limit_tokens_per_second or None
