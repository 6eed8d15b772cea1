#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs the servers for the tests of tiers, if allowed: Debian packages, as root.
# Never fails: the tests of a missing server are skipped, with a message.
set -uo pipefail
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

missing=()
for pair in redis-server:redis-server nginx:nginx-light docker-registry:docker-registry skopeo:skopeo; do
  command -v "${pair%%:*}" > /dev/null || missing+=("${pair##*:}")
done
[ ${#missing[@]} -eq 0 ] && exit 0

if ! command -v apt-get > /dev/null || [ "$(id -u)" -ne 0 ]; then
  echo "servers: without ${missing[*]}, whose tests are skipped; as root: apt-get install ${missing[*]}" >&2
  exit 0
fi

echo "Installing ${missing[*]} (once; the tests of tiers use them)" >&2
# A mirror that can't be reached delays the tests by 150 seconds at most.
apt() {
  timeout $((SECONDS < 150 ? 150 - SECONDS : 1)) apt-get -qq -o DPkg::Lock::Timeout=60 -o Dpkg::Use-Pty=0 \
    -o Acquire::Retries=1 -o Acquire::http::Timeout=15 -o Acquire::https::Timeout=15 "$@" > /dev/null
}
install() {
  # At run level 1 no service is started: the tests start their own servers.
  RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt install --yes --no-install-recommends "$@"
}
install "${missing[@]}" 2> /dev/null && exit 0
apt update || true
install "${missing[@]}" && exit 0
# A package that can't be installed must not keep the others from being installed.
for package in "${missing[@]}"; do
  install "$package" 2> /dev/null || echo "servers: $package can't be installed; its tests are skipped" >&2
done
exit 0
