# vaultd and vaultctl, with SoftHSM's module for development. docker-compose.yml runs it; it
# also serves by itself: give it settings in the environment (README, Configuration of
# vaultd), and files for the PIN and the database's URL.
#
# The programs load the token's module at run time, so they need a C library and a dynamic
# loader: neither a static build nor an empty image will do. A vendor's module takes
# SoftHSM's place by a mount and two settings (README, Operations).

FROM golang:1.26-bookworm AS build
WORKDIR /src
# A module proxy of your own, if you have one; go.sum guards what it sends.
ARG GOPROXY
# What vaultctl and the metrics call this build; none if it is left out.
ARG VERSION
COPY . .
# No 'go mod download' first: it would fetch what other programs need, too.
RUN CGO_ENABLED=1 go build -trimpath -ldflags="-s -w -X github.com/backup-key-vault/bkv/cmd/internal/version.version=$VERSION" \
	-o /out/ ./cmd/vaultd ./cmd/vaultctl

FROM debian:bookworm-slim
# ca-certificates: for a database over TLS. What dpkg and apt write besides the files goes.
RUN apt-get update \
	&& apt-get install -y --no-install-recommends ca-certificates libsofthsm2 \
	&& apt-get clean \
	&& rm -rf /var/lib/apt/lists/* /var/cache/debconf/*-old /var/lib/dpkg/*-old /var/log/* \
	&& groupadd --system --gid 10001 bkv \
	&& useradd --system --uid 10001 --gid bkv --home-dir /var/lib/bkv --no-create-home --shell /usr/sbin/nologin bkv \
	&& cd /var/lib && install -d -o bkv -g bkv -m 0700 bkv bkv/token bkv/development \
	&& install -d -o bkv -g bkv -m 0755 bkv/secrets bkv/secrets/database bkv/secrets/owner bkv/secrets/vaultd
COPY ops/container/softhsm2.conf /etc/bkv/softhsm2.conf
COPY ops/container/first-start /usr/local/bin/bkv-first-start
COPY --from=build /out/ /usr/local/bin/
ENV SOFTHSM2_CONF=/etc/bkv/softhsm2.conf
USER 10001:10001
WORKDIR /var/lib/bkv
EXPOSE 8420
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["vaultctl", "ready"]
# vaultd is process 1: it handles SIGTERM itself and has no children.
CMD ["vaultd"]
