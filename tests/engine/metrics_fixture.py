"""What a Prometheus server would scrape from an engine in this process."""

from prometheus_client import REGISTRY


def scrape(prefix):
    """{name{label=value,...}: value} of every sample of the metrics whose names begin with "vllm:" + prefix.

    Without vLLM's own labels, and without histograms' buckets.
    """
    found = {}
    for family in REGISTRY.collect():
        for sample in family.samples:
            name = sample.name.removeprefix("vllm:")
            if name.startswith(prefix) and not name.endswith(("_bucket", "_created")):
                labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
                text = ",".join(f"{k}={v}" for k, v in sorted(labels.items()))
                found[f"{name}{{{text}}}" if text else name] = sample.value
    return found


def record_every_step(llm):
    """As `vllm serve` does. LLM drops the statistics of steps that end without a token for anybody."""
    engine = llm.llm_engine
    scheduler, loggers = engine.engine_core.engine_core.scheduler, engine.logger_manager
    make_stats = scheduler.make_stats

    def make_and_record(*args, **stats_of):
        stats = make_stats(*args, **stats_of)
        loggers.record(scheduler_stats=stats, iteration_stats=None)
        return stats

    scheduler.make_stats, engine.logger_manager = make_and_record, None
