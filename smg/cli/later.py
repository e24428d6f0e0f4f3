"""Flags that exist elsewhere and do nothing here yet.

Owns the names that are refused instead of ignored (contract section 2): those of later groups, and those of Shepherd Model
Gateway 1.13.0 that are no promise of ours. A start script that counts on one of them must not start without it. When a flag
begins to work it leaves this file in the same commit.
"""

from __future__ import annotations

from smg.settings_flag import env_name

_NAMES = """
selector prefill-selector decode-selector router-selector service-discovery-port service-discovery-namespace
model-id-from

history-backend history-memory-max-responses history-memory-max-items history-memory-retention-secs postgres-db-url
postgres-pool-max postgres-pool-max-size redis-url redis-pool-max redis-pool-max-size redis-retention-days
storage-context-headers max-background-responses

mcp-config-path model-path model tokenizer-path chat-template disable-tokenizer-autoload tokenizer-cache-enable-l0
tokenizer-cache-l0-max-entries tokenizer-cache-enable-l1 tokenizer-cache-l1-max-memory reasoning-parser tool-call-parser
"""

_NAMES_ELSEWHERE = """
cache-boundaries cache-index dp-minimum-tokens-scheduler enable-rl enable-wasm encode encode-policy encode-selector
epd-disaggregation jemalloc-prof-dir job-queue-capacity job-queue-concurrency kv-connector-annotation
kv-engine-id-annotation kv-index least-load-max-waiting-requests log-mm-timing mm-allow-private-media-hosts
mm-allowed-media-domains mm-per-request-image-limit mm-pixel-cache-mb mm-pixel-rdma mm-processing
multimodal-max-inflight-bytes multimodal-shm-min-bytes multimodal-tensor-transport no-worker-auto-recovery
oracle-connect-descriptor oracle-external-auth oracle-password oracle-pool-max oracle-pool-min oracle-pool-timeout-secs
oracle-tns-alias oracle-username oracle-wallet-path overlap-decay parser pd-admission-wait-secs postgres-op-timeout-secs
power-of-two-load-metric prefill-max-inflight-requests-per-worker prefill-queue-size prefill-queue-timeout-secs
prefix-hash-balance-abs-threshold priority-scheduler-tenant-metric-top-n rdma-listen-ip rdma-slot-ttl-s
redis-op-timeout-secs rl-control-timeout-secs rl-fanout-concurrency schema-config selection-accounting-ttl-ms
selection-policy selection-temperature storage-hook-wasm-path tokenizer-cache-l0-max-memory upstream-http2
worker-auto-recovery worker-stale-secs worker-stall-secs worker-warmup-blocks worker-warmup-divert-every
worker-warmup-secs worker-warmup-share worker-warmup-thin-ratio worker-wedge-secs zmq-engine-count
"""

LATER_FLAGS: frozenset[str] = frozenset(f"--{name}" for name in (_NAMES + _NAMES_ELSEWHERE).split())
"""Names with their dashes."""

LATER_ENV_NAMES: dict[str, str] = {env_name(name): f"--{name}" for name in _NAMES.split()}
"""Environment variable to flag, for the flags of this contract; those of others never were variables of ours."""
