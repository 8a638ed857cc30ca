# Not the slim variant: building jemalloc needs `make`.
FROM rust:1.95-bookworm AS builder
WORKDIR /build

# Embeds the list of dependencies in the program, where image scanners find it.
RUN cargo install cargo-auditable --version 0.7.7 --locked

# Builds only the dependencies, with empty sources, so that a change of the sources does not rebuild this layer.
COPY Cargo.toml Cargo.lock build.rs ./
COPY .cargo .cargo
COPY proto proto
COPY third_party third_party
# cargo requires the benchmark that the manifest names to exist, but does not compile it.
RUN mkdir src benches \
    && echo 'fn main() {}' > src/main.rs \
    && touch src/lib.rs benches/hot_path.rs \
    && cargo auditable build --profile dist --features jemalloc --locked \
    && rm -rf src

COPY src src
# cargo compares time stamps, and COPY keeps those of the working tree.
RUN touch src/main.rs src/lib.rs \
    && cargo auditable build --profile dist --features jemalloc --locked

# Contains the C runtime and CA certificates, but no shell. Its user is 65532.
FROM gcr.io/distroless/cc-debian12:nonroot
LABEL org.opencontainers.image.title="rds-task-facade" \
      org.opencontainers.image.description="gRPC facade over the RDS call Obtaining Task Information" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=builder /build/target/dist/rds-task-facade /rds-task-facade
# [::] accepts IPv4 too, and is 0.0.0.0 on a machine without IPv6.
ENV RDS_TASK_FACADE_LISTEN=[::]:50051 \
    RDS_TASK_FACADE_METRICS_LISTEN=[::]:9464 \
    RDS_TASK_FACADE_LOG_FORMAT=json
EXPOSE 50051 9464
USER 65532:65532
# `health` reads the variables of the listener, TLS included, and times out after 3 s; the rest allows for a slow process start on a busy machine.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s CMD ["/rds-task-facade", "health"]
ENTRYPOINT ["/rds-task-facade"]
CMD ["serve"]
