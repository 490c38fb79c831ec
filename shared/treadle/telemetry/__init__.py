"""What the services say of themselves: logs now, metrics and traces beside them."""

from treadle.telemetry.logs import bind_request_id, configure_logging

__all__ = ["bind_request_id", "configure_logging"]
