// MUL_MAT_ID on stacks whose experts have types of their own: one product of the CPU backend for each type.
//
// The (token, expert) pairs of a node are grouped by the type of the expert. Each group is a MUL_MAT_ID of the CPU
// backend on the experts of that type, which are a stack of their own, in a graph that holds all nodes handed over at
// once. What is left to do here is to bring the rows of the operand together and the rows of the result apart.
#pragma once

#include "container.h"

#include <ggml-backend.h>
#include <ggml-cpu.h>

#include <cstdio>
#include <deque>
#include <memory>

// Absent from the global scope where the CPU backend is a library that ggml loads by itself.
#pragma weak ggml_get_type_traits_cpu

namespace alphaq {

// A container with its groups as tensors that the CPU backend multiplies with.
struct Stack {
    Container container;
    std::vector<ggml_tensor *> tensors;  // one a group
    std::vector<bool> rearranged;        // whether a group's lies in a repacking buffer, which reads floats only
    std::vector<ggml_backend_buffer_t> buffers;
    ggml_context * ctx = nullptr;

    Stack() = default;
    Stack(const Stack &) = delete;
    ~Stack() {
        for (ggml_backend_buffer_t buffer : buffers) {
            ggml_backend_buffer_free(buffer);
        }
        ggml_free(ctx);
    }
};

// Up to so many pairs, rows are moved by one thread: a step of all threads takes longer.
constexpr size_t FEW_PAIRS = 32;

struct Pair {
    int32_t slot;
    int32_t token;
    int32_t place;  // of the expert, among those of its type
};

// The pairs of one type, in the order of tokens and slots.
struct Pairs {
    const Pair * first;
    size_t n;

    const Pair & operator[](size_t i) const { return first[i]; }

    // How far apart their slots are, if they are of one token and as far apart everywhere; else 0.
    int32_t step() const {
        const int32_t step = n > 1 ? first[1].slot - first[0].slot : 1;
        for (size_t i = 1; i < n; i++) {
            if (first[i].token != first[0].token || first[i].slot - first[i - 1].slot != step) {
                return 0;
            }
        }
        return step;
    }
};

// Rows of a tensor, found by slot and token; where it has fewer slots, they repeat.
struct Rows {
    char * data;
    int64_t n_slots;
    size_t slot_stride;
    size_t token_stride;
    size_t row_bytes;

    char * at(Pair pair) const { return data + pair.slot % n_slots * slot_stride + pair.token * token_stride; }
};

struct Move {
    Rows rows;
    Pairs pairs;
    char * packed;

    void gather(size_t first, size_t last) const {
        for (size_t i = first; i < last; i++) {
            memcpy(packed + i * rows.row_bytes, rows.at(pairs[i]), rows.row_bytes);
        }
    }
    void scatter(size_t first, size_t last) const {
        for (size_t i = first; i < last; i++) {
            memcpy(rows.at(pairs[i]), packed + i * rows.row_bytes, rows.row_bytes);
        }
    }
};

template <void (Move::*move)(size_t, size_t) const> void run_move(ggml_tensor *, int ith, int nth, void * user) {
    const Move & self = *static_cast<const Move *>(user);
    const size_t n = self.pairs.n;
    (self.*move)(n * ith / nth, n * (ith + 1) / nth);
}

// Memory that lasts for one graph; a larger block replaces those that did not suffice.
class Scratch {
  public:
    char * take(size_t size) {
        size = GGML_PAD(size, 64);
        if (blocks.empty() || used + size > blocks.back().size) {
            blocks.push_back(Block(std::max(size, blocks.empty() ? size_t(1) << 20 : 2 * blocks.back().size)));
            used = 0;
        }
        used += size;
        return blocks.back().start + used - size;
    }
    void reset() {
        if (blocks.size() > 1) {
            blocks.erase(blocks.begin(), blocks.end() - 1);
        }
        used = 0;
    }

  private:
    struct Block {
        explicit Block(size_t size) : size(size), memory(new char[size + 64]) {
            start = reinterpret_cast<char *>(GGML_PAD(reinterpret_cast<uintptr_t>(memory.get()), 64));
        }
        size_t size;
        std::unique_ptr<char[]> memory;
        char * start;
    };
    std::vector<Block> blocks;
    size_t used = 0;
};

// The nodes that are computed in one graph of the CPU backend.
class Batch {
  public:
    explicit Batch(Scratch & scratch) : scratch(scratch) { scratch.reset(); }
    ~Batch() { ggml_free(ctx); }
    Batch(const Batch &) = delete;

    // Add a node; empty, or what is wrong with its experts' numbers.
    std::string add(ggml_tensor * node, const Stack & stack) {
        nodes.emplace_back();
        Node & added = nodes.back();
        added.node = node;
        added.stack = &stack;
        const ggml_tensor * ids = node->src[2];
        const Container & container = stack.container;
        const auto expert_at = [&](int64_t token, int64_t slot) {
            int32_t expert;
            memcpy(&expert, static_cast<const char *>(ids->data) + token * ids->nb[1] + slot * ids->nb[0], 4);
            return expert;
        };
        // Where the pairs of each type end, then begin.
        added.starts.assign(stack.tensors.size() + 1, 0);
        for (int64_t token = 0; token < ids->ne[1]; token++) {
            for (int64_t slot = 0; slot < ids->ne[0]; slot++) {
                const int32_t expert = expert_at(token, slot);
                if (expert < 0 || size_t(expert) >= container.group_of.size()) {
                    return "expert " + std::to_string(expert) + " is asked for";
                }
                added.starts[container.group_of[expert]]++;
            }
        }
        for (size_t g = 1; g < added.starts.size(); g++) {
            added.starts[g] += added.starts[g - 1];
        }
        added.pairs.resize(added.starts.back());
        for (int64_t token = ids->ne[1] - 1; token >= 0; token--) {
            for (int64_t slot = ids->ne[0] - 1; slot >= 0; slot--) {
                const int32_t expert = expert_at(token, slot);
                size_t & start = added.starts[container.group_of[expert]];
                added.pairs[--start] = {int32_t(slot), int32_t(token), container.place_of[expert]};
            }
        }
        n_tensors += 4 + 8 * stack.tensors.size();
        return "";
    }

    // Whether a node reads what a node of this batch computes.
    bool computes_source_of(const ggml_tensor * node) const {
        const auto base = [](const ggml_tensor * tensor) { return tensor->view_src ? tensor->view_src : tensor; };
        return std::any_of(nodes.begin(), nodes.end(), [&](const Node & other) {
            return base(node->src[1]) == base(other.node) || base(node->src[2]) == base(other.node);
        });
    }

    bool empty() const { return nodes.empty(); }

    ggml_status compute(ggml_backend_t cpu) {
        const size_t size = ggml_tensor_overhead() * n_tensors + ggml_graph_overhead_custom(n_tensors, false);
        ctx = ggml_init({size, scratch.take(size), true});
        graph = ggml_new_graph_custom(ctx, n_tensors, false);
        for (Node & node : nodes) {
            for (size_t g = 0; g + 1 < node.starts.size(); g++) {
                const Pairs pairs{node.pairs.data() + node.starts[g], node.starts[g + 1] - node.starts[g]};
                if (pairs.n > 0) {
                    add_group(node, g, pairs);
                }
            }
        }
        const ggml_status status = ggml_backend_graph_compute(cpu, graph);
        for (const Move * move : late) {
            move->scatter(0, move->pairs.n);
        }
        return status;
    }

  private:
    struct Node {
        ggml_tensor * node;
        const Stack * stack;
        std::vector<Pair> pairs;     // by type
        std::vector<size_t> starts;  // of each type's, and the end
    };
    struct Rounded {
        const ggml_tensor * source;
        ggml_tensor * tensor;
    };

    ggml_tensor * place(ggml_tensor * tensor, void * data) {
        tensor->data = data;
        return tensor;
    }

    // dst[:, slot, token] = experts of one type x src[:, slot % slots of src, token], for the pairs of that type
    void add_group(const Node & node, size_t g, Pairs pairs) {
        ggml_tensor * experts = node.stack->tensors[g];
        ggml_tensor * dst = node.node;
        const ggml_tensor * src = dst->src[1];
        const int64_t n = int64_t(pairs.n);
        const bool few = pairs.n <= FEW_PAIRS;
        const Rows results{static_cast<char *>(dst->data), dst->ne[1], dst->nb[1], dst->nb[2],
                           dst->ne[0] * sizeof(float)};

        // Pairs of one token whose slots are evenly apart, such as two, need no moving: strides reach them where they are.
        const int32_t step = few && (src->ne[1] == 1 || src->ne[1] == dst->ne[1]) ? pairs.step() : 0;
        ggml_tensor * ids = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, step ? n : 1, step ? 1 : n);
        place(ids, scratch.take(ggml_nbytes(ids)));
        for (int64_t i = 0; i < n; i++) {
            static_cast<int32_t *>(ids->data)[i] = pairs[i].place;
        }
        ggml_tensor * product = ggml_mul_mat_id(ctx, experts, operand(node, g, pairs, step), ids);
        if (step) {
            product->data = results.at(pairs[0]);
            product->nb[1] = dst->nb[1] * step;
            product->nb[2] = product->nb[3] = product->nb[1] * n;
            ggml_build_forward_expand(graph, product);
            return;
        }
        place(product, scratch.take(ggml_nbytes(product)));
        moves.push_back({results, pairs, static_cast<char *>(product->data)});
        if (few) {
            late.push_back(&moves.back());
            ggml_build_forward_expand(graph, product);
        } else {
            add_move<&Move::scatter>(product, GGML_TYPE_F32, 1, 1);
        }
    }

    // The rows that a group multiplies with: [cols, 1, pairs], or [cols, slots, 1] of one token, slots a step apart.
    ggml_tensor * operand(const Node & node, size_t g, Pairs pairs, int32_t step) {
        ggml_tensor * src = node.node->src[1];
        const int64_t n_cols = src->ne[0], n = int64_t(pairs.n);
        Rows rows{static_cast<char *>(src->data), src->ne[1], src->nb[1], src->nb[2], n_cols * sizeof(float)};
        if (step) {
            ggml_tensor * view = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n_cols, src->ne[1] == 1 ? 1 : n, 1);
            view->nb[1] = src->nb[1] * step;
            view->nb[2] = view->nb[3] = src->nb[1] * view->ne[1];
            return place(view, rows.at(pairs[0]));
        }
        if (pairs.n <= FEW_PAIRS) {
            ggml_tensor * packed = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n_cols, 1, n);
            place(packed, scratch.take(ggml_nbytes(packed)));
            Move{rows, pairs, static_cast<char *>(packed->data)}.gather(0, pairs.n);
            return packed;
        }
        ggml_type type = GGML_TYPE_F32;
        ggml_tensor * blocks = nullptr;
        if (!node.stack->rearranged[g] && ggml_get_type_traits_cpu != nullptr) {
            type = ggml_get_type_traits_cpu(node.stack->container.groups[g].type)->vec_dot_type;
        }
        if (type != GGML_TYPE_F32) {
            // Rounded once for all experts that a token goes to, as the CPU backend would do for one stack.
            blocks = rounded(src, type);
            const size_t row_bytes = ggml_row_size(type, n_cols);
            rows = {static_cast<char *>(blocks->data), src->ne[1], row_bytes, row_bytes * src->ne[1], row_bytes};
        }
        char * packed = scratch.take(ggml_row_size(type, n_cols) * n);
        moves.push_back({rows, pairs, packed});
        return add_move<&Move::gather>(blocks, type, n_cols, n);
    }

    // An operand as blocks of `type`: [cols, slots * tokens]
    ggml_tensor * rounded(ggml_tensor * src, ggml_type type) {
        for (const Rounded & known : roundings) {
            if (known.source == src && known.tensor->type == type) {
                return known.tensor;
            }
        }
        ggml_tensor * floats = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, src->ne[0], src->ne[1], src->ne[2]);
        if (ggml_is_contiguous(src)) {
            // One dimension of rows, which threads share.
            floats = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, src->ne[0], src->ne[1] * src->ne[2]);
        } else {
            floats->nb[1] = src->nb[1];
            floats->nb[2] = floats->nb[3] = src->nb[2];
        }
        place(floats, src->data);
        ggml_tensor * blocks = ggml_new_tensor_2d(ctx, type, src->ne[0], src->ne[1] * src->ne[2]);
        place(blocks, scratch.take(ggml_nbytes(blocks)));
        ggml_tensor * copy = place(ggml_cpy(ctx, floats, blocks), blocks->data);
        roundings.push_back({src, copy});
        return copy;
    }

    // The move that was added last, as a node after `source`; its result is [cols, 1, n] where rows are packed. What
    // llama.cpp's own graph has computed is no source: it would become part of this one.
    template <void (Move::*move)(size_t, size_t) const>
    ggml_tensor * add_move(ggml_tensor * source, ggml_type type, int64_t n_cols, int64_t n) {
        ggml_tensor * moved = ggml_custom_4d(ctx, type, n_cols, 1, n, 1, &source, source ? 1 : 0, run_move<move>,
                                             GGML_N_TASKS_MAX, &moves.back());
        place(moved, moves.back().packed);
        ggml_build_forward_expand(graph, moved);
        return moved;
    }

    Scratch & scratch;
    std::deque<Node> nodes;
    std::deque<Move> moves;
    std::vector<const Move *> late;
    std::vector<Rounded> roundings;
    size_t n_tensors = 0;
    ggml_context * ctx = nullptr;
    ggml_cgraph * graph = nullptr;
};

}  // namespace alphaq
