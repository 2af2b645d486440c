#!/usr/bin/env bash
# TPU slices of a GKE cluster, by JobSet.
set -euo pipefail
usage() {
    cat << 'USAGE'
usage: bash launch/gke.sh ACTION --name NAME [OPTIONS] [-- VERB ...]

  create   a node pool for each slice, in a cluster that is there
  image    builds launch/Dockerfile and pushes it
  run      applies launch/jobset.yaml: `python -m bltjax VERB ...` on every host
  watch    state and pods, then the first host's log as it is written
  stop     ends the run; the nodes stay
  delete   gives the nodes back

  --topology v5p:4x4x4   chip and shape of a slice, as `python -m bltjax plan` has (create, run)
  --slices 2             how many of them; default 1 (create, run, delete)
  --image IMAGE          REGISTRY/REPOSITORY/bltjax:TAG (image, run)
  --service_account KSA  of Kubernetes, that may read and write the bucket; default default (run)
  --restarts 50          at most (run)
  --cluster CLUSTER --location LOCATION    (create, delete)
  --project PROJECT      default: gcloud's own (create, delete)
  --spot                 cheaper, may be preempted (create)
  --dry-run              prints commands and manifest, runs nothing, contacts nothing

run, watch and stop take the cluster that kubectl is set to, which needs JobSet
(https://jobset.sigs.k8s.io, "Installation"). A run that exits with 75 or loses a node is restarted
whole and resumes; codes 1 and 2 end it.
USAGE
}
cd "$(dirname "$0")/.."
source launch/launching.sh
name='' topology='' slices=1 image='' service_account=default restarts=50
cluster='' location='' project=() spot=()
[ $# -gt 0 ] || { usage >&2; exit 2; }
case "$1" in
    create|image|run|watch|stop|delete) action="$1"; shift ;;
    -h|--help) usage; exit 0 ;;
    *) fail "$1 is not an action: create, image, run, watch, stop or delete" ;;
esac
while [ $# -gt 0 ]; do
    case "$1" in
        --name) name="$(value_of "$@")"; shift 2 ;;
        --topology) topology="$(value_of "$@")"; shift 2 ;;
        --slices) slices="$(value_of "$@")"; shift 2 ;;
        --image) image="$(value_of "$@")"; shift 2 ;;
        --service_account) service_account="$(value_of "$@")"; shift 2 ;;
        --restarts) restarts="$(value_of "$@")"; shift 2 ;;
        --cluster) cluster="$(value_of "$@")"; shift 2 ;;
        --location) location="$(value_of "$@")"; shift 2 ;;
        --project) check_project "$(value_of "$@")"; project=("$1=$2"); shift 2 ;;
        --spot) spot=(--spot); shift ;;
        --dry-run) dry_run=true; shift ;;
        -h|--help) usage; exit 0 ;;
        --) shift; break ;;
        *) fail "there is no option $1; --help lists them" ;;
    esac
done
[ "$action" = image ] || check_name --name "$name"
check_count --slices "$slices" 64
check_count --restarts "$restarts" 1000
check --service_account "$service_account" '[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?' bltjax
case "$action" in
    create|run) slice "$topology" ;;
esac
case "$action" in
    image|run)
        check --image "$image" '[a-z0-9]+([-._:/][a-z0-9]+)*' \
            us-docker.pkg.dev/my-project/images/bltjax:1 ;;
esac
case "$action" in
    create|delete)
        check_name --cluster "$cluster"
        check --location "$location" '[a-z]+-[a-z]+[0-9]+(-[a-z])?' us-east5
        in_cluster=(--cluster="$cluster" --location="$location" "${project[@]}") ;;
esac
if [ "$action" = run ]; then
    check_command "$@"
else
    [ $# -eq 0 ] || fail "$action runs nothing, so nothing may follow --"
fi

create() {
    needs gcloud
    local number topology_of_pool=()
    # A pool of one host is given no topology: its machine has one.
    [ "$hosts" -eq 1 ] || topology_of_pool=(--tpu-topology="$shape")
    for ((number = 0; number < slices; number++)); do
        perform gcloud container node-pools create "$name-$number" "${in_cluster[@]}" \
            --machine-type="$machine" "${topology_of_pool[@]}" --num-nodes="$hosts" \
            "${spot[@]}" --scopes=cloud-platform
    done
}

image() {
    needs docker
    perform docker build --file launch/Dockerfile --build-arg EXTRAS=tpu,gs --tag "$image" .
    perform docker push "$image"
}

# Arguments as JSON, which is YAML; Kubernetes would expand $(NAME), and reads $$ as $.
manifest() {
    NAME="$name" SLICES="$slices" HOSTS="$hosts" CHIPS_PER_HOST="$chips_per_host" SHAPE="$shape" \
    GKE_CHIP="$gke_chip" IMAGE="$image" SERVICE_ACCOUNT="$service_account" \
    RESTARTS="$restarts" \
        python3 -c '
import json, os, string, sys
words = json.dumps([word.replace("$", "$$") for word in sys.argv[1:]])
text = string.Template(open("launch/jobset.yaml").read())
print(text.substitute(os.environ, ARGUMENTS=words), end="")' "$@"
}

run() {
    needs kubectl python3
    if $dry_run; then
        echo "kubectl apply --filename - << 'MANIFEST'"
        manifest "$@"
        echo MANIFEST
    else
        manifest "$@" | kubectl apply --filename -
    fi
}

watch() {
    needs kubectl
    local of="jobset.sigs.k8s.io/jobset-name=$name" first
    first="$of,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    perform kubectl get jobset "$name"
    perform kubectl get pods --selector "$of" --output wide
    perform kubectl logs --follow --selector "$first"
}

stop() {
    needs kubectl
    perform kubectl delete jobset "$name"
}

delete() {
    needs gcloud
    local number
    for ((number = 0; number < slices; number++)); do
        perform gcloud container node-pools delete "$name-$number" "${in_cluster[@]}" --quiet
    done
}

"$action" "$@"
