# Not the slim one, which has no `make`; jemalloc is built with it.
FROM rust:1.95-bookworm AS builder
WORKDIR /build

# Writes the list of dependencies into the program, where image scanners find it.
RUN cargo install cargo-auditable --version 0.7.7 --locked

# The dependencies alone, over empty sources: this layer is built again only when one of them changes.
COPY Cargo.toml Cargo.lock build.rs ./
COPY .cargo .cargo
COPY proto proto
COPY third_party third_party
# cargo wants the benchmark that the manifest names, too, but does not compile it.
RUN mkdir src benches \
    && echo 'fn main() {}' > src/main.rs \
    && touch src/lib.rs benches/hot_path.rs \
    && cargo auditable build --profile dist --features jemalloc --locked \
    && rm -rf src

COPY src src
# cargo goes by time stamps, and COPY keeps the ones of the working tree.
RUN touch src/main.rs src/lib.rs \
    && cargo auditable build --profile dist --features jemalloc --locked

# Holds the C runtime and the CA certificates, no shell; its user is 65532.
FROM gcr.io/distroless/cc-debian12:nonroot
LABEL org.opencontainers.image.title="rds-task-facade" \
      org.opencontainers.image.description="gRPC facade over the RDS call Obtaining Task Information" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=builder /build/target/dist/rds-task-facade /rds-task-facade
ENV RDS_TASK_FACADE_LISTEN=0.0.0.0:50051 \
    RDS_TASK_FACADE_METRICS_LISTEN=0.0.0.0:9464 \
    RDS_TASK_FACADE_LOG_FORMAT=json
EXPOSE 50051 9464
USER 65532:65532
# `health` gives up by itself after 3 s; the rest is for the start of the process on a busy machine.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s CMD ["/rds-task-facade", "health"]
ENTRYPOINT ["/rds-task-facade"]
CMD ["serve"]
