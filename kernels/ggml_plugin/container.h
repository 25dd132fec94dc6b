// Containers: where the experts of a stack lie in the bytes of its tensor. docs/container.md describes the format.
// Nothing read from a file is used before it is checked.
#pragma once

#include <ggml.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace alphaq {

constexpr char MAGIC[8] = {'A', 'L', 'P', 'H', 'A', 'Q', 'E', 'X'};
constexpr uint32_t VERSION = 1;
constexpr uint64_t ALIGNMENT = 32;

struct Header {
    char magic[8];
    uint32_t version;
    uint32_t n_experts;
    uint32_t n_rows;
    uint32_t n_cols;
    uint64_t payload_end;
    uint32_t crc;
    uint32_t reserved;
};

struct Entry {
    uint32_t type;
    uint32_t reserved;
    uint64_t offset;
};

static_assert(sizeof(Header) == 40 && sizeof(Entry) == 16, "the file's structures have no padding");

// Experts of one type, which follow each other without gaps: a stack of its own.
struct Group {
    ggml_type type;
    int64_t n_experts = 0;
    uint64_t offset = 0;  // bytes from the tensor's start
    size_t n_bytes = 0;
};

struct Container {
    std::vector<Group> groups;
    std::vector<int32_t> group_of;  // by expert
    std::vector<int32_t> place_of;  // by expert, in its group
};

// CRC-32 as zlib computes it, over header and table with the field itself taken as zero.
inline uint32_t checksum(const uint8_t * data, size_t size) {
    uint32_t crc = 0xffffffffu;
    for (size_t i = 0; i < size; i++) {
        const bool own = i >= offsetof(Header, crc) && i < offsetof(Header, crc) + 4;
        crc ^= own ? 0 : data[i];
        for (int bit = 0; bit < 8; bit++) {
            crc = (crc >> 1) ^ (0xedb88320u & (0u - (crc & 1u)));
        }
    }
    return ~crc;
}

inline bool is_expert_type(uint32_t type) {
    switch (type) {
        case GGML_TYPE_F32:
        case GGML_TYPE_F16:
        case GGML_TYPE_BF16:
        case GGML_TYPE_Q4_0:
        case GGML_TYPE_Q5_0:
        case GGML_TYPE_Q5_1:
        case GGML_TYPE_Q8_0:
        case GGML_TYPE_IQ4_NL:
        case GGML_TYPE_Q2_K:
        case GGML_TYPE_Q3_K:
        case GGML_TYPE_Q4_K:
        case GGML_TYPE_Q5_K:
        case GGML_TYPE_Q6_K:
            return true;
        default:
            return false;
    }
}

// Read the container in `size` bytes of a tensor of shape ne; empty, or what is wrong with it.
inline std::string parse(const uint8_t * data, size_t size, const int64_t * ne, Container & found) {
    Header header;
    if (size < sizeof(header)) {
        return "it is too short";
    }
    memcpy(&header, data, sizeof(header));
    if (memcmp(header.magic, MAGIC, sizeof(MAGIC)) != 0) {
        return "it does not start with a container's magic: keep ordinary tensors out of this buffer type";
    }
    if (header.version != VERSION) {
        return "its version is " + std::to_string(header.version) + ", this plug-in reads " + std::to_string(VERSION);
    }
    if (ne[3] != 1 || ne[2] != header.n_experts || ne[1] != header.n_rows || ne[0] != header.n_cols) {
        return "it was made for another shape";
    }
    const uint64_t table_end = sizeof(Header) + uint64_t(header.n_experts) * sizeof(Entry);
    if (header.n_experts == 0 || table_end > size) {
        return "its table does not fit";
    }
    if (checksum(data, table_end) != header.crc) {
        return "the checksum of its table does not match";
    }
    std::vector<int32_t> index(GGML_TYPE_COUNT, -1);
    found = Container();
    uint64_t last = 0;
    for (uint32_t i = 0; i < header.n_experts; i++) {
        Entry entry;
        memcpy(&entry, data + sizeof(Header) + i * sizeof(Entry), sizeof(entry));
        const std::string expert = "expert " + std::to_string(i);
        if (!is_expert_type(entry.type)) {
            return expert + " has type " + std::to_string(entry.type) + ", which experts cannot have";
        }
        const ggml_type type = ggml_type(entry.type);
        if (header.n_cols % ggml_blck_size(type) != 0) {
            return expert + ": rows of " + std::to_string(header.n_cols) + " do not divide into its blocks";
        }
        // Both factors are below 2^32 times a few bytes, and no product of more is formed before the bounds hold.
        const uint64_t row_bytes = ggml_row_size(type, header.n_cols);
        if (row_bytes > size || header.n_rows > size / row_bytes) {
            return expert + " does not fit";
        }
        const uint64_t n_bytes = row_bytes * header.n_rows;
        if (entry.offset < table_end || entry.offset > size || n_bytes > size - entry.offset) {
            return expert + " lies outside";
        }
        if (index[type] < 0) {
            if (entry.offset % ALIGNMENT != 0) {
                return expert + " is not aligned";
            }
            index[type] = int32_t(found.groups.size());
            found.groups.push_back({type, 0, entry.offset, 0});
        }
        Group & group = found.groups[index[type]];
        if (entry.offset != group.offset + group.n_bytes) {
            return expert + " does not follow the one of its type before it";
        }
        found.group_of.push_back(index[type]);
        found.place_of.push_back(int32_t(group.n_experts));
        group.n_experts++;
        group.n_bytes += n_bytes;
        last = std::max(last, entry.offset + n_bytes);
    }
    std::vector<Group> sorted = found.groups;
    std::sort(sorted.begin(), sorted.end(), [](const Group & a, const Group & b) { return a.offset < b.offset; });
    for (size_t i = 1; i < sorted.size(); i++) {
        if (sorted[i - 1].offset + sorted[i - 1].n_bytes > sorted[i].offset) {
            return "experts overlap";
        }
    }
    return last == header.payload_end ? "" : "its experts do not end where it says";
}

}  // namespace alphaq
