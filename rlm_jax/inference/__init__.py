"""From token ids to steps: KV pages, prefill, step decoding, scoring, sampling."""
