"""TorchServe's metrics under their true names, and the questions an autoscaler and an alert ask of them.

TorchServe 0.12 exposes three cumulative counters per model (no histogram, so no percentile): requests, and microseconds
spent in total and in the queue. Their `model_version` is "default" unless the URL names one. A request counts into the
latency counters when it is answered, so a wedged worker does not raise them: `stalled` is what notices that.
Not covered: who scrapes (Prometheus), who scales (KEDA, with `queue_wait_microseconds` as its query).
"""

from __future__ import annotations

REQUESTS = "ts_inference_requests_total"
LATENCY = "ts_inference_latency_microseconds"
QUEUE = "ts_queue_latency_microseconds"
ANSWERED = "Requests2XX"


def queue_wait_microseconds(model: str, window: str = "2m") -> str:
    """PromQL: mean time that a request waited in the queue, in microseconds, over all replicas; 0 without traffic."""
    waited, asked = (f'sum(rate({name}{{model_name="{model}"}}[{window}]))' for name in (QUEUE, REQUESTS))
    return f"({waited} or vector(0)) / clamp_min({asked} or vector(0), 0.001)"


def stalled(model: str, window: str = "2m") -> str:
    """PromQL: 1 if requests come in and nothing is answered, else nothing. The alert beside the autoscaler."""
    asked = f'sum(rate({REQUESTS}{{model_name="{model}"}}[{window}]))'
    return f"({asked} > 0) and on() (sum(rate({ANSWERED}[{window}])) or vector(0)) == 0"
