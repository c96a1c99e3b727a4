#!/bin/bash
# What TSUBAME 4.0 makes of a submission, for gridengine.sh: -l node_f=N is N whole nodes, and h_rt must be given.
jsv_on_start() { return; }
jsv_on_verify() {
  if [ "$(jsv_sub_is_param l_hard node_f)" = true ] && [ "$(jsv_is_param pe_name)" = false ]; then
    nodes=$(jsv_sub_get_param l_hard node_f)
    if [ "$(jsv_sub_is_param l_hard h_rt)" != true ]; then jsv_reject "h_rt must be specified"; return; fi
    jsv_sub_del_param l_hard node_f
    jsv_set_param pe_name mpi_f
    jsv_set_param pe_min $((8 * nodes))
    jsv_set_param pe_max $((8 * nodes))
    jsv_correct "node_f"
    return
  fi
  jsv_accept "ok"
}
# shellcheck source=/dev/null
. /usr/share/gridengine/util/resources/jsv/jsv_include.sh
jsv_main
