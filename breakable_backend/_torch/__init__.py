"""Every private torch name that this package uses, wrapped; nothing else in the package touches one.

Checked on torch 2.11.0 (CUDA 13.0 and CPU) and on 2.13.0, 2.14.1 and 2.15.0 (CPU), unless a line says otherwise: all names are at
the same place on these.

What ``import torch`` leaves out is imported where it is needed: Dynamo, AOTAutograd, Inductor and symbols take longer to
import than all else together, and a program that marks its functions may never compile them.
"""

from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.multiprocessing.reductions import StorageWeakRef as StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as without_modes

from breakable_backend._torch.aot import (
    apart,
    forget_effect_tokens,
    static_input_indices,
    trace_inference,
    written_without_wrappers,
)
from breakable_backend._torch.as_python import (
    can_run_as_python,
    heed_requests_for_python,
    hide_from_dynamo,
    run_as_python,
    thread,
)
from breakable_backend._torch.compiled import Subject, codes_of, holds_compiled, running_compiled, subjects_of
from breakable_backend._torch.cuda import (
    ONE_CAPTURE_STATE,
    allocating_to_pool,
    before_groups_end,
    clear_cublas_workspaces,
    current_device,
    current_raw_stream,
    demangle,
    is_stream_capturing,
    keep_for_ever,
    launch_hooks,
    memory_as_it_is,
    release_pool,
    stop_allocating_to_pool,
)
from breakable_backend._torch.dynamo import (
    Place,
    at_recompile_limit,
    break_of_dynamo,
    code_under_compilation,
    constant_under_dynamo,
    current_compilation,
    current_compile_id,
    forget_code_of,
    frame_callback,
    global_state,
    graph_breaks,
    in_a_body,
    is_shared,
    keep_with_code,
    may_use_freed_guards,
    place_of,
    places_read,
    recompile_reason,
    refuses_graph_breaks,
    set_frame_callback,
    skipped,
    stance,
    stance_is_default,
    tensors_like,
    trace_artifact,
    until_reset,
)
from breakable_backend._torch.exceptions import CompileTimeError, dynamo_error, is_dynamos
from breakable_backend._torch.frames import (
    argument_count,
    dynamo_frames,
    function_in,
    graph_behind,
    graph_called_by,
    hooks_around,
    may_read_training,
    owner_of_call,
    passes_on,
    takes_any_keyword,
    unguarded,
)
from breakable_backend._torch.graphs import lazy_module, make_code, noted
from breakable_backend._torch.modes import (
    ENTER_AUTOCAST,
    ENTER_INFERENCE_MODE,
    EXIT_AUTOCAST,
    SET_GRAD_ENABLED,
    Autocast,
    GradMode,
    above_autograd,
    any_autocast_enabled,
    composites_as_ops,
    dispatch_mode_active,
    dispatch_modes,
    forward_ad_active,
    function_modes,
    guard_on_forward_ad,
    number_of_dispatch_modes,
    number_of_function_modes,
    profiler_enabled,
    set_grad_enabled,
    with_autograd,
    without_alias_check,
)
from breakable_backend._torch.module_calls import heed_calls_of_modules
from breakable_backend._torch.ops import (
    Op,
    apply_function,
    apply_plainly,
    aten,
    below_autograd,
    dense_kernel,
    find_overloads,
    is_composite,
    is_composite_by_name,
    is_effectful,
    is_region,
    kernel_made_of_ops,
    never_run_on_constants,
    once_differentiable,
    op_names,
    out_of_place,
    overloads,
    python_implementation,
    results_like,
    schema_name,
    wait_tensor,
    written_by_kernel,
)
from breakable_backend._torch.symbols import (
    evaluate,
    free_symbols,
    fresh_int,
    has_hint,
    hint_of,
    ignore_fresh_symbols,
    is_about_numbers,
    is_argument_float,
    is_ragged,
    name_of,
    numbers_of,
    symbol_of,
    symbols_made,
)
from breakable_backend._torch.tensors import (
    PYTREE_NODES,
    address_of,
    are_at,
    base_of_view,
    clones_together,
    copy_together,
    extent,
    foreach_copy,
    has_hooks,
    is_traced,
    is_transformed,
    layout_check,
    lazy_bits,
    live_storage,
    negated_view,
    owners_of_storage,
    same_generator,
    saves_through_hooks,
    storage_at,
    storage_key,
    storage_of,
    swapped,
    twin_storage,
    unowned_storage,
    version_of,
    with_lazy_bits,
)
from breakable_backend._torch.training import (
    FakeTensor,
    autocast_off,
    compiled_autograd_active,
    functorch_active,
    graph_is_kept,
    keeps_its_address,
    next_node_number,
    node_number,
    number_backward,
    retains,
    trace_joint,
    traced_otherwise,
    traced_so_far,
    tracing_both_halves,
    without_hooks,
)
