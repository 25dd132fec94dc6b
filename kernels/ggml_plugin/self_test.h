// A product with a known answer, computed as llama.cpp would: a stack of four experts, two types, weights that are whole
// numbers and operands that 8 bits hold exactly, so that the sum of products is the answer to the last digit.
#pragma once

#include "ggml_backend_interface.h"

#include "container.h"

namespace alphaq {
namespace {

constexpr int SELF_TEST_COLS = 64, SELF_TEST_ROWS = 16, SELF_TEST_EXPERTS = 4, SELF_TEST_USED = 2;

// Whole numbers from -7 to 7.
int self_test_weight(int expert, int row, int col) { return (expert * 5 + row * 3 + col * 7 + row * col) % 15 - 7; }

// Whole numbers from -127 to 127, where 127 stands in each block of 32: rounded to 8 bits they stay what they are.
int self_test_operand(int token, int col) { return col % 32 == token % 32 ? 127 : (token * 11 + col * 29) % 255 - 127; }

std::vector<uint8_t> self_test_stack() {
    const uint16_t one = 0x3c00;  // in half precision
    const size_t n_blocks = SELF_TEST_ROWS * SELF_TEST_COLS / 32;
    const ggml_type types[] = {GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0};
    const size_t n_bytes[] = {n_blocks * 34, n_blocks * 18, n_blocks * 34, n_blocks * 18};
    // By type: Q4_0 has the smaller number.
    const size_t first = GGML_PAD(sizeof(Header) + SELF_TEST_EXPERTS * sizeof(Entry), ALIGNMENT);
    const size_t second = GGML_PAD(first + n_bytes[1] + n_bytes[3], ALIGNMENT);
    const size_t offsets[] = {second, first, second + n_bytes[0], first + n_bytes[1]};
    std::vector<uint8_t> bytes(second + n_bytes[0] + n_bytes[2]);
    for (int expert = 0; expert < SELF_TEST_EXPERTS; expert++) {
        uint8_t * block = bytes.data() + offsets[expert];
        for (int row = 0; row < SELF_TEST_ROWS; row++) {
            for (int start = 0; start < SELF_TEST_COLS; start += 32) {
                memcpy(block, &one, 2);
                block += 2;
                if (types[expert] == GGML_TYPE_Q8_0) {
                    for (int i = 0; i < 32; i++) {
                        *block++ = uint8_t(int8_t(self_test_weight(expert, row, start + i)));
                    }
                } else {
                    for (int i = 0; i < 16; i++) {
                        const int low = self_test_weight(expert, row, start + i) + 8;
                        const int high = self_test_weight(expert, row, start + i + 16) + 8;
                        *block++ = uint8_t(low | high << 4);
                    }
                }
            }
        }
        const Entry entry = {uint32_t(types[expert]), 0, offsets[expert]};
        memcpy(bytes.data() + sizeof(Header) + expert * sizeof(Entry), &entry, sizeof(entry));
    }
    Header header = {{}, VERSION, SELF_TEST_EXPERTS, SELF_TEST_ROWS, SELF_TEST_COLS, bytes.size(), 0, 0};
    memcpy(header.magic, MAGIC, sizeof(MAGIC));
    memcpy(bytes.data(), &header, sizeof(header));
    header.crc = checksum(bytes.data(), sizeof(Header) + SELF_TEST_EXPERTS * sizeof(Entry));
    memcpy(bytes.data(), &header, sizeof(header));
    return bytes;
}

// Empty, or what is wrong with the product of `n_tokens` tokens on a device's stack.
std::string self_test_product(ggml_backend_t backend, ggml_tensor * experts, int n_tokens) {
    ggml_context * ctx = ggml_init({ggml_tensor_overhead() * 8 + ggml_graph_overhead(), nullptr, true});
    ggml_tensor * operand = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, SELF_TEST_COLS, 1, n_tokens);
    ggml_tensor * ids = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, SELF_TEST_USED, n_tokens);
    ggml_tensor * product = ggml_mul_mat_id(ctx, experts, operand, ids);
    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, product);
    std::vector<float> operands(ggml_nelements(operand)), results(ggml_nelements(product), -1.0f);
    std::vector<int32_t> chosen(ggml_nelements(ids));
    for (int token = 0; token < n_tokens; token++) {
        for (int col = 0; col < SELF_TEST_COLS; col++) {
            operands[token * SELF_TEST_COLS + col] = float(self_test_operand(token, col));
        }
        for (int slot = 0; slot < SELF_TEST_USED; slot++) {
            chosen[token * SELF_TEST_USED + slot] = (token + slot * (1 + token % 2)) % SELF_TEST_EXPERTS;
        }
    }
    operand->data = operands.data();
    ids->data = chosen.data();
    product->data = results.data();
    std::string problem;
    if (!supports_op(&computing_device, product)) {
        problem = "the product is refused";
    } else if (ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS) {
        problem = "the product fails";
    }
    for (size_t i = 0; i < results.size() && problem.empty(); i++) {
        const int row = int(i) % SELF_TEST_ROWS, pair = int(i) / SELF_TEST_ROWS, token = pair / SELF_TEST_USED;
        long expected = 0;
        for (int col = 0; col < SELF_TEST_COLS; col++) {
            expected += long(self_test_weight(chosen[pair], row, col)) * self_test_operand(token, col);
        }
        // Not a number fails the comparison as well.
        if (!(results[i] == float(expected))) {
            problem = "row " + std::to_string(row) + " of expert " + std::to_string(chosen[pair]) + " is " +
                      std::to_string(results[i]) + ", not " + std::to_string(expected);
        }
    }
    ggml_free(ctx);
    return problem;
}

// Empty, or why a device does not compute what it should with a stack that is mapped, or copied to it.
std::string self_test(ggml_backend_dev_t device, bool map) {
    // A container is any type large enough: here 16-bit numbers.
    std::vector<uint8_t> file = self_test_stack();
    file.resize(size_t(SELF_TEST_EXPERTS) * SELF_TEST_ROWS * SELF_TEST_COLS * 2);
    ggml_context * ctx = ggml_init({ggml_tensor_overhead() * 2, nullptr, true});
    ggml_tensor * experts = ggml_new_tensor_3d(ctx, GGML_TYPE_F16, SELF_TEST_COLS, SELF_TEST_ROWS, SELF_TEST_EXPERTS);
    ggml_set_name(experts, "self-test");
    ggml_backend_buffer_t buffer;
    if (map) {
        buffer = ggml_backend_dev_buffer_from_host_ptr(device, file.data(), file.size(), file.size());
        ggml_backend_tensor_alloc(buffer, experts, file.data());
    } else {
        buffer = ggml_backend_buft_alloc_buffer(ggml_backend_dev_buffer_type(device), file.size());
        ggml_backend_tensor_alloc(buffer, experts, ggml_backend_buffer_get_base(buffer));
        ggml_backend_tensor_set(experts, file.data(), 0, file.size());
    }
    ggml_backend_buffer_set_usage(buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    ggml_backend_t backend = ggml_backend_dev_init(device, nullptr);
    std::string problem = backend ? "" : "no backend";
    // One token, few, and so many that rows are moved by all threads.
    for (int n_tokens : {1, 5, 100}) {
        problem = problem.empty() ? self_test_product(backend, experts, n_tokens) : problem;
    }
    ggml_backend_free(backend);
    ggml_backend_buffer_free(buffer);
    ggml_free(ctx);
    return problem;
}

}  // namespace
}  // namespace alphaq
