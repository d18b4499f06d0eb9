#!/bin/sh
# Prepares MLflow's database and then serves, or does one of the two: serve.sh [migrate|serve] [mlflow server's options].
# Users and permissions are kept in the same PostgreSQL as the runs (the tables and their versions do not meet), so a
# new pod or container knows them and the nightly dump holds them. MLflow's own default is a file that a pod loses.
set -eu

what=all
case "${1:-}" in migrate | serve) what=$1 && shift ;; esac

# Read by MLflow from a file only; the database's password is in it, so nobody else may read it.
export MLFLOW_AUTH_CONFIG_PATH="${MLFLOW_AUTH_CONFIG_PATH:-/tmp/mlflow-auth.ini}"
umask 077
cat > "$MLFLOW_AUTH_CONFIG_PATH" << INI
[mlflow]
default_permission = READ
admin_username = admin
database_uri = $(printf %s "$MLFLOW_BACKEND_STORE_URI" | sed 's/%/%%/g')
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 60
INI

if [ "$what" != serve ]; then
  mlflow db upgrade "$MLFLOW_BACKEND_STORE_URI"
  python -m mlflow.server.auth db upgrade --url "$MLFLOW_BACKEND_STORE_URI"
fi
if [ "$what" != migrate ]; then
  # On a busy machine a worker that is still importing does not answer within uvicorn's 5 s: it would be ended again and again.
  exec mlflow server --app-name basic-auth --backend-store-uri "$MLFLOW_BACKEND_STORE_URI" \
    --artifacts-destination "$MLFLOW_ARTIFACTS_DESTINATION" --serve-artifacts \
    --uvicorn-opts "--timeout-worker-healthcheck 60" "$@"
fi
