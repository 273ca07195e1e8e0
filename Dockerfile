# docker build -o out .    leaves out/agent, bit for bit what ./build.sh makes on Debian 12
FROM debian:12 AS build
WORKDIR /src
COPY build.sh agent.c agent.h ./
COPY shims shims
COPY vendor vendor
RUN ./build.sh

FROM scratch
COPY --from=build /src/out/agent /agent
