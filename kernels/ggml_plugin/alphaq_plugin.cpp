// A ggml backend that computes with containers: devices whose buffers hold stacks of experts of different types.
//
// llama.cpp puts a tensor there when it is told to (-ot "exps.weight=ALPHAQ") and then sends its MUL_MAT_ID here. ALPHAQ
// computes on the mapped file; ALPHAQ_REPACK copies experts into the buffers in which the CPU backend rearranges weights
// for the processor, where it has any for their type. Both compute in the CPU backend, with operands and results in its memory.
#include "ggml_backend_interface.h"

#include "container.h"
#include "experts.h"

#include <mutex>
#include <new>
#include <unordered_map>

namespace alphaq {
namespace {

ggml_backend_reg_t registry();
ggml_backend_dev_t cpu_device() { return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU); }

template <typename Function> Function cpu_function(const char * name) {
    return reinterpret_cast<Function>(ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu_device()), name));
}

// Buffers of weights

constexpr std::align_val_t BUFFER_ALIGNMENT{64};

enum class Memory {
    MAPPED,  // a file's
    OWNED,
    NONE,  // stacks have their own, and addresses only tell tensors apart
};

struct Weights {
    char * base;
    Memory memory;
    bool repack;
    std::mutex lock;
    std::unordered_map<const void *, std::unique_ptr<Stack>> stacks;  // by address; none where it is damaged

    ~Weights() {
        if (memory == Memory::OWNED) {
            operator delete(base, BUFFER_ALIGNMENT);
        }
    }
};

Weights & weights_of(ggml_backend_buffer_t buffer) { return *static_cast<Weights *>(buffer->context); }

ggml_backend_buffer_type_t repacking_type(ggml_context * ctx, const Group & group, const int64_t * ne) {
    const auto list = cpu_function<ggml_backend_dev_get_extra_bufts_t>("ggml_backend_dev_get_extra_bufts");
    ggml_backend_buffer_type_t * type = list ? list(cpu_device()) : nullptr;
    for (; type && *type; type++) {
        ggml_tensor * experts = ggml_new_tensor_3d(ctx, group.type, ne[0], ne[1], group.n_experts);
        ggml_tensor * rows = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, ne[0], 1, 1);
        ggml_tensor * ids = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 1, 1);
        ggml_tensor * product = ggml_mul_mat_id(ctx, experts, rows, ids);
        experts->buffer = ggml_backend_buft_alloc_buffer(*type, 0);
        const bool fits = ggml_backend_dev_supports_op(cpu_device(), product);
        ggml_backend_buffer_free(experts->buffer);
        if (fits) {
            return *type;
        }
    }
    return nullptr;
}

// The stack in a tensor's bytes; none, with a message, when they are damaged. With `repack`, groups are copied where the
// CPU backend can rearrange them, others only if the bytes do not `stay`.
std::unique_ptr<Stack> open_stack(const ggml_tensor * tensor, const char * data, bool repack, bool stay) {
    auto stack = std::make_unique<Stack>();
    const uint8_t * bytes = reinterpret_cast<const uint8_t *>(data);
    const std::string problem = parse(bytes, ggml_nbytes(tensor), tensor->ne, stack->container);
    if (!problem.empty()) {
        fprintf(stderr, "alphaq: %s is no container that can be used: %s\n", tensor->name, problem.c_str());
        return nullptr;
    }
    const size_t n_groups = stack->container.groups.size();
    stack->ctx = ggml_init({ggml_tensor_overhead() * 128 * (n_groups + 1), nullptr, true});
    for (const Group & group : stack->container.groups) {
        ggml_tensor * experts = ggml_new_tensor_3d(stack->ctx, group.type, tensor->ne[0], tensor->ne[1], group.n_experts);
        void * place = const_cast<char *>(data + group.offset);
        ggml_backend_buffer_type_t type = repack ? repacking_type(stack->ctx, group, tensor->ne) : nullptr;
        stack->rearranged.push_back(type != nullptr);
        if (type || !stay) {
            type = type ? type : ggml_backend_dev_buffer_type(cpu_device());
            ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(type, ggml_nbytes(experts));
            if (!buffer) {
                fprintf(stderr, "alphaq: %s: out of memory\n", tensor->name);
                return nullptr;
            }
            stack->buffers.push_back(buffer);
            ggml_backend_buffer_set_usage(buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
            ggml_backend_tensor_alloc(buffer, experts, ggml_backend_buffer_get_base(buffer));
            ggml_backend_tensor_set(experts, place, 0, ggml_nbytes(experts));
        } else {
            experts->data = place;
        }
        stack->tensors.push_back(experts);
    }
    return stack;
}

// The stack that was opened for a tensor, or is now; none when it is damaged.
const Stack * find_stack(const ggml_tensor * tensor) {
    Weights & weights = weights_of(tensor->buffer);
    std::lock_guard<std::mutex> guard(weights.lock);
    auto found = weights.stacks.find(tensor->data);
    if (found == weights.stacks.end() && weights.memory != Memory::NONE) {
        auto opened = open_stack(tensor, static_cast<const char *>(tensor->data), weights.repack, true);
        found = weights.stacks.emplace(tensor->data, std::move(opened)).first;
    }
    return found == weights.stacks.end() ? nullptr : found->second.get();
}

// A mapped tensor is whole when it is placed: what is wrong with it shows, and what takes time is done, while loading.
ggml_status init_tensor(ggml_backend_buffer_t buffer, ggml_tensor * tensor) {
    return weights_of(buffer).memory != Memory::MAPPED || find_stack(tensor) ? GGML_STATUS_SUCCESS : GGML_STATUS_FAILED;
}

void free_weights(ggml_backend_buffer_t buffer) { delete &weights_of(buffer); }
void * base_of_weights(ggml_backend_buffer_t buffer) { return weights_of(buffer).base; }

void set_tensor(ggml_backend_buffer_t buffer, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    Weights & weights = weights_of(buffer);
    std::lock_guard<std::mutex> guard(weights.lock);
    if (weights.memory != Memory::NONE) {
        memcpy(static_cast<char *>(tensor->data) + offset, data, size);
        weights.stacks.erase(tensor->data);
    } else if (offset == 0 && size == ggml_nbytes(tensor)) {
        weights.stacks[tensor->data] = open_stack(tensor, static_cast<const char *>(data), true, false);
    } else {
        fprintf(stderr, "alphaq: %s comes in parts, which cannot be repacked\n", tensor->name);
        weights.stacks[tensor->data] = nullptr;
    }
}

void get_tensor(ggml_backend_buffer_t buffer, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    if (weights_of(buffer).memory == Memory::NONE) {
        GGML_ABORT("alphaq: the bytes of %s were repacked and cannot be read", tensor->name);
    }
    memcpy(data, static_cast<const char *>(tensor->data) + offset, size);
}

void clear_weights(ggml_backend_buffer_t, uint8_t) {}

ggml_backend_buffer_t make_buffer(ggml_backend_buffer_type_t type, char * base, size_t size, Memory memory, bool repack) {
    auto * weights = new Weights{base, memory, repack, {}, {}};
    ggml_backend_buffer_i iface = {};
    iface.free_buffer = free_weights;
    iface.get_base = base_of_weights;
    iface.init_tensor = init_tensor;
    iface.set_tensor = set_tensor;
    iface.get_tensor = get_tensor;
    iface.clear = clear_weights;
    return ggml_backend_buffer_init(type, iface, weights, size);
}

const char * name_of_mapped(ggml_backend_buffer_type_t) { return "ALPHAQ"; }
const char * name_of_repacking(ggml_backend_buffer_type_t) { return "ALPHAQ_REPACK"; }
size_t alignment(ggml_backend_buffer_type_t) { return ALIGNMENT; }
bool never_host(ggml_backend_buffer_type_t) { return false; }

ggml_backend_buffer_t alloc_plain(ggml_backend_buffer_type_t type, size_t size) {
    char * base = static_cast<char *>(operator new(size, BUFFER_ALIGNMENT, std::nothrow));
    return base ? make_buffer(type, base, size, Memory::OWNED, false) : nullptr;
}

ggml_backend_buffer_t alloc_repacking(ggml_backend_buffer_type_t type, size_t size) {
    // An address that is aligned, and never followed.
    return make_buffer(type, reinterpret_cast<char *>(uintptr_t(1) << 12), size, Memory::NONE, true);
}

// The backend

struct Worker {
    ggml_backend_t cpu;
    ggml_threadpool_t pool;
    int pool_threads;
    int n_threads;
    Scratch scratch;
};

Worker & worker_of(ggml_backend_t backend) { return *static_cast<Worker *>(backend->context); }

void free_pool(Worker & worker) {
    if (worker.pool) {
        cpu_function<void (*)(ggml_threadpool_t)>("ggml_threadpool_free")(worker.pool);
        worker.pool = nullptr;
    }
}

// Threads are started when they are first needed, and kept: without a pool, each graph would start its own.
void ready_threads(Worker & worker) {
    if (worker.pool_threads >= worker.n_threads) {
        return;
    }
    const auto make = cpu_function<ggml_threadpool_t (*)(ggml_threadpool_params *)>("ggml_threadpool_new");
    const auto use = cpu_function<void (*)(ggml_backend_t, ggml_threadpool_t)>("ggml_backend_cpu_set_threadpool");
    if (make && use) {
        ggml_threadpool_params params = ggml_threadpool_params_default(worker.n_threads);
        ggml_threadpool_t fresh = make(&params);
        use(worker.cpu, fresh);
        free_pool(worker);
        worker.pool = fresh;
    }
    worker.pool_threads = worker.n_threads;
}

void set_n_threads(ggml_backend_t backend, int n_threads) {
    Worker & worker = worker_of(backend);
    worker.n_threads = n_threads;
    cpu_function<ggml_backend_set_n_threads_t>("ggml_backend_set_n_threads")(worker.cpu, n_threads);
}

void set_abort_callback(ggml_backend_t backend, ggml_abort_callback callback, void * data) {
    if (const auto set = cpu_function<ggml_backend_set_abort_callback_t>("ggml_backend_set_abort_callback")) {
        set(worker_of(backend).cpu, callback, data);
    }
}

const char * backend_name(ggml_backend_t) { return "ALPHAQ"; }

void free_backend(ggml_backend_t backend) {
    Worker & worker = worker_of(backend);
    ggml_backend_free(worker.cpu);
    free_pool(worker);
    delete &worker;
    delete backend;
}

ggml_status compute(ggml_backend_t backend, ggml_cgraph * graph) {
    Worker & worker = worker_of(backend);
    ready_threads(worker);
    auto batch = std::make_unique<Batch>(worker.scratch);
    for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
        ggml_tensor * node = ggml_graph_node(graph, i);
        if (node->op != GGML_OP_MUL_MAT_ID) {
            continue;  // views
        }
        const Stack * stack = find_stack(node->src[0]);
        if (!stack) {
            return GGML_STATUS_FAILED;
        }
        if (batch->computes_source_of(node)) {
            const ggml_status status = batch->compute(worker.cpu);
            if (status != GGML_STATUS_SUCCESS) {
                return status;
            }
            batch.reset();
            batch = std::make_unique<Batch>(worker.scratch);
        }
        const std::string problem = batch->add(node, *stack);
        if (!problem.empty()) {
            fprintf(stderr, "alphaq: %s: %s of %d\n", node->src[0]->name, problem.c_str(), int(node->src[0]->ne[2]));
            return GGML_STATUS_FAILED;
        }
    }
    return batch->empty() ? GGML_STATUS_SUCCESS : batch->compute(worker.cpu);
}

// Devices: those that llama.cpp sees own weights. The backend itself belongs to one that is not registered, whose
// buffers are the CPU's, so that operands and results need no copies.

extern ggml_backend_buffer_type mapped_buffers, repacking_buffers;
extern ggml_backend_device mapped_device, repacking_device, computing_device;

bool is_ours(ggml_backend_buffer_type_t type) { return type == &mapped_buffers || type == &repacking_buffers; }

const char * name_of_device(ggml_backend_dev_t device) { return device == &repacking_device ? "ALPHAQ_REPACK" : "ALPHAQ"; }
const char * description(ggml_backend_dev_t) { return "experts of different types in one stack"; }
void get_memory(ggml_backend_dev_t, size_t * free, size_t * total) { *free = *total = 0; }
enum ggml_backend_dev_type get_type(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_ACCEL; }

void get_props(ggml_backend_dev_t device, ggml_backend_dev_props * props) {
    *props = {};
    props->name = name_of_device(device);
    props->description = description(device);
    props->type = GGML_BACKEND_DEVICE_TYPE_ACCEL;
    props->caps.buffer_from_host_ptr = device != &computing_device;
}

ggml_backend_t make_backend(ggml_backend_dev_t, const char *) {
    static ggml_guid guid = {0xa1, 0xfa, 0x0e, 0x5c, 0x27, 0x9b, 0x4d, 0x3e, 0x8f, 0x60, 0x13, 0x2d, 0x77, 0xc4, 0x51, 0x88};
    ggml_backend_t cpu = ggml_backend_dev_init(cpu_device(), nullptr);
    if (!cpu) {
        return nullptr;
    }
    ggml_backend_i iface = {};
    iface.get_name = backend_name;
    iface.free = free_backend;
    iface.graph_compute = compute;
    auto * backend = new ggml_backend{&guid, iface, &computing_device, new Worker{cpu, nullptr, 0, 1, {}}};
    set_n_threads(backend, GGML_DEFAULT_N_THREADS);
    return backend;
}

ggml_backend_buffer_type_t buffer_type(ggml_backend_dev_t device) {
    return device == &computing_device ? ggml_backend_dev_buffer_type(cpu_device())
           : device == &mapped_device  ? &mapped_buffers
                                       : &repacking_buffers;
}

ggml_backend_buffer_t map_buffer(ggml_backend_dev_t device, void * start, size_t size, size_t) {
    const bool repack = device == &repacking_device;
    return make_buffer(buffer_type(device), static_cast<char *>(start), size, Memory::MAPPED, repack);
}

bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) {
    const ggml_tensor * holder = op->op == GGML_OP_MUL_MAT_ID ? op->src[0] : op;
    ggml_backend_buffer_t buffer = holder->view_src ? holder->view_src->buffer : holder->buffer;
    if (!buffer || !is_ours(ggml_backend_buffer_get_type(buffer))) {
        return false;
    }
    if (op->op == GGML_OP_NONE) {
        return true;
    }
    // llama.cpp asks of every tensor of every model whether it could be here, with an empty buffer: only those belong
    // here that the user sends.
    return op->op == GGML_OP_MUL_MAT_ID && buffer->usage == GGML_BACKEND_BUFFER_USAGE_WEIGHTS && !holder->view_src &&
           op->src[1]->type == GGML_TYPE_F32 && op->src[1]->nb[0] == sizeof(float) && op->type == GGML_TYPE_F32;
}

bool supports_buft(ggml_backend_dev_t, ggml_backend_buffer_type_t type) {
    return is_ours(type) || ggml_backend_buft_is_host(type);
}

ggml_backend_device_i device_interface(bool maps) {
    ggml_backend_device_i iface = {};
    iface.get_name = name_of_device;
    iface.get_description = description;
    iface.get_memory = get_memory;
    iface.get_type = get_type;
    iface.get_props = get_props;
    iface.init_backend = make_backend;
    iface.get_buffer_type = buffer_type;
    iface.buffer_from_host_ptr = maps ? map_buffer : nullptr;
    iface.supports_op = supports_op;
    iface.supports_buft = supports_buft;
    return iface;
}

ggml_backend_buffer_type mapped_buffers = {
    {name_of_mapped, alloc_plain, alignment, nullptr, nullptr, never_host}, &mapped_device, nullptr};
ggml_backend_buffer_type repacking_buffers = {
    {name_of_repacking, alloc_repacking, alignment, nullptr, nullptr, never_host}, &repacking_device, nullptr};
ggml_backend_device mapped_device = {device_interface(true), registry(), nullptr};
ggml_backend_device repacking_device = {device_interface(true), registry(), nullptr};
ggml_backend_device computing_device = {device_interface(false), registry(), nullptr};

// The registry

const char * registry_name(ggml_backend_reg_t) { return "ALPHAQ"; }
size_t device_count(ggml_backend_reg_t) { return 2; }
ggml_backend_dev_t device_at(ggml_backend_reg_t, size_t i) { return i == 0 ? &mapped_device : &repacking_device; }

void * find_function(ggml_backend_reg_t, const char * name) {
    if (strcmp(name, "ggml_backend_set_n_threads") == 0) {
        return reinterpret_cast<void *>(set_n_threads);
    }
    if (strcmp(name, "ggml_backend_set_abort_callback") == 0) {
        return reinterpret_cast<void *>(set_abort_callback);
    }
    return nullptr;
}

ggml_backend_reg_t registry() {
    static ggml_backend_reg reg = {BACKEND_API_VERSION, {registry_name, device_count, device_at, find_function}, nullptr};
    return &reg;
}

}  // namespace
}  // namespace alphaq

#include "self_test.h"

// What ggml calls when it loads the library; none, with a message, where it would not compute rightly.
extern "C" __attribute__((visibility("default"))) ggml_backend_reg_t ggml_backend_init(void) {
    ggml_backend_dev_t cpu = alphaq::cpu_device();
    if (!cpu) {
        fprintf(stderr, "alphaq: this llama.cpp has no CPU backend loaded\n");
        return nullptr;
    }
    // The version is the first field of any version of this structure.
    const int version = ggml_backend_dev_backend_reg(cpu)->api_version;
    if (version != BACKEND_API_VERSION) {
        fprintf(stderr, "alphaq: made for version %d of ggml's backend API, this llama.cpp has %d\n", BACKEND_API_VERSION,
                version);
        return nullptr;
    }
    for (ggml_backend_dev_t device : {&alphaq::mapped_device, &alphaq::repacking_device}) {
        std::string problem = alphaq::self_test(device, true);
        problem = problem.empty() ? alphaq::self_test(device, false) : problem;
        if (!problem.empty()) {
            fprintf(stderr, "alphaq: self-test of %s failed: %s\n", alphaq::name_of_device(device), problem.c_str());
            return nullptr;
        }
    }
    return alphaq::registry();
}
