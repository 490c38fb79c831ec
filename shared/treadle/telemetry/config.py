"""Where traces go: OpenTelemetry's own variables, read once."""

from __future__ import annotations

from pydantic import AliasChoices, Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class TracesConfig(BaseSettings):
    """Whether and how traces are sent; what else OpenTelemetry's SDK reads it reads by itself."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    endpoint: str = Field(
        default="",
        validation_alias=AliasChoices("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"),
    )
    exporter: str = Field(default="", validation_alias="OTEL_TRACES_EXPORTER")
    """"otlp", "console" (JSON lines on standard error) or "none"; unset: "otlp" with an endpoint."""
    disabled: bool = Field(default=False, validation_alias="OTEL_SDK_DISABLED")

    @property
    def chosen(self) -> str:
        """The exporter to use; "none": traces are off."""
        if self.disabled:
            return "none"
        return self.exporter or ("otlp" if self.endpoint else "none")
