"""Traces of requests, by OpenTelemetry: the extra `otel`, imported only with --otlp-traces-endpoint.

`middleware.py` opens the span of an HTTP request, `exporter.py` sends what this process and others have recorded.
"""
