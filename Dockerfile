# docker build -o out .    leaves out/agent, bit for bit what ./build.sh makes on Debian 12
# docker build -o out --target runtime --build-arg RUNTIME=debian-12-python .    leaves out/runtime.squashfs
FROM debian:12 AS build
WORKDIR /src
COPY build.sh agent.c agent.h ./
COPY shims shims
COPY vendor vendor
RUN ./build.sh

FROM build AS image
ARG RUNTIME=debian-12-python
COPY runtimes runtimes
RUN ./build.sh image "$RUNTIME" --format squashfs --out /runtime.squashfs

FROM scratch AS runtime
COPY --from=image /runtime.squashfs /

FROM scratch
COPY --from=build /src/out/agent /agent
